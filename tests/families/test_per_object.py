"""A model that is still steered is freed with its last reference; copies have a clock of their own."""

import copy
import gc
import pickle
import weakref

import pytest
import tiny_diffusion
import tiny_language
import torch
from tiny_infinity import WIDTH, Published, tiny_pipeline

import pysteer
from pysteer.families.base import find_family
from pysteer.families.per_object import PerObject
from pysteer.steering import Plan, SiteParameters


def infinity_shift() -> SiteParameters:
    return SiteParameters("ffn.0", "affine_shift", None, {"gain": torch.ones(1, WIDTH), "bias": torch.ones(1, WIDTH)})


def diffusion():
    pipe = tiny_diffusion.quiet(tiny_diffusion.stable_diffusion())
    return pipe, tiny_diffusion.shift("ca.1"), lambda: pipe(
        ["a red circle"], num_inference_steps=1, height=16, width=16, output_type="latent"
    )  # fmt: skip


def language():
    model = tiny_language.build("llama")
    return model, tiny_language.shift("block.1"), lambda: tiny_language.out(model)


def infinity():
    pipe = tiny_pipeline()
    return pipe, infinity_shift(), lambda: pipe(["a cross"])


def denoiser():
    model = tiny_diffusion.unet()
    return model, tiny_diffusion.shift("ca.1"), lambda: tiny_diffusion.out(model, "unet")


def published():
    model = Published(tiny_pipeline().transformer)
    return model, infinity_shift(), lambda: None


@pytest.mark.parametrize("make", [language, infinity, published, diffusion, denoiser])
@torch.no_grad()
def test_a_steered_model_that_nobody_has_is_freed(make) -> None:
    model, parameters, run = make()
    handle = pysteer.steer(model, Plan.build([parameters])).__enter__()
    run()
    gone = weakref.ref(model)
    del model, run, handle
    gc.collect()
    assert gone() is None


def test_values_belong_to_one_object() -> None:
    values: PerObject[list[int]] = PerObject("numbers")
    layer = torch.nn.Linear(2, 2)
    assert values.find(layer) is None
    own = values.get(layer, list)
    assert values.get(layer, list) is own
    assert values.find(layer) is own
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert values.find(other) is None
        assert values.get(other, list) is not own
    assert values.find(layer) is own
    values.set(layer, [1])
    assert values.find(layer) == [1]
    values.drop(layer)
    values.drop(layer)
    assert values.find(layer) is None
    assert layer.state_dict().keys() == {"weight", "bias"}


def test_a_copied_model_has_a_clock_of_its_own() -> None:
    model = tiny_language.build("llama")
    family = find_family(model)
    replica = copy.deepcopy(model)
    with pysteer.steer(model, Plan.build([tiny_language.shift("block.1")])):
        steered, plain = tiny_language.out(model), tiny_language.out(replica)
        late = copy.deepcopy(model)
        assert torch.equal(tiny_language.out(late), plain)
    assert not torch.allclose(steered, plain, atol=1e-3)
    clocks = [family.clock(each, "text") for each in (model, replica, late)]
    assert len({clock.data_ptr() for clock in clocks}) == 3
