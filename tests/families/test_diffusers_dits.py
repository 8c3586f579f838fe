"""Current diffusion transformers in their pipelines: which rows and calls are conditional, and that sites steer."""

import pytest
import torch
from tiny_diffusion import WIDTH, Plain, shift
from tiny_dits import PIPELINES, encoded
from torch import Tensor

import pysteer
from pysteer.families.base import find_family
from pysteer.steering import Plan

STEPS = 2
FIRST = "first run"
# Where the conditional rows are: in one of two halves of a run, or in the first of two runs.
COND = {"sana": "second half", "z_image": "first half", "qwen": FIRST, "chroma": FIRST, "lumina": FIRST}


def run(pipe, name: str, **more) -> Tensor:
    side, guidance = (64 if name == "sana" else 16), ("true_cfg_scale" if name == "qwen" else "guidance_scale")
    settings = {"height": side, "width": side, "output_type": "latent", "num_inference_steps": STEPS, guidance: 3.0}
    if name == "sana":
        settings["use_resolution_binning"] = False
    negative = {f"negative_{key}": value for key, value in encoded(name, 2).items()}
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(
        prompt=None, negative_prompt=None, **encoded(name, 1), **negative, generator=noise, **settings, **more
    ).images


def chosen(where: str, rows: str):
    """Strength of every row, given the number of rows and how often the module ran before."""

    def of(count: int, call: int) -> Tensor:
        if where == FIRST:
            return torch.full((count,), float((call % 2 == 0) == (rows == "cond")))
        second = torch.arange(count) >= count // 2
        return (second == ((where == "second half") == (rows == "cond"))).float()

    return of


@pytest.mark.parametrize("site", ["block.1", "attn.1", "ff.1"])
@pytest.mark.parametrize("name", PIPELINES)
def test_conditional_rows_are_steered_and_no_others(name: str, site: str) -> None:
    pipe = PIPELINES[name]()
    plain, parameters = run(pipe, name), shift(site)
    sites = find_family(pipe).sites(pipe)
    if name == "chroma" and site == "ff.1":
        assert site not in sites  # attention and feed-forward share their last layer there
        return
    where = sites[site]
    assert where.width == WIDTH
    for rows in ("cond", "uncond"):
        module = pipe.transformer.get_submodule(where.path)
        with Plain(module, parameters, where.element, where.layout, chosen(COND[name], rows)):
            expected = run(pipe, name)
        with pysteer.steer(pipe, Plan.build([parameters], rows=rows)) as handle:
            steered = run(pipe, name)
            handle.strength = 0.0
            assert torch.equal(run(pipe, name), plain)
        torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not torch.allclose(steered, plain, atol=1e-4)
    assert torch.equal(run(pipe, name), plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_effect_begins_exactly_at_its_step(name: str) -> None:
    pipe, seen = PIPELINES[name](), []

    def note(pipe, step, timestep, given):
        seen.append(given["latents"].clone())
        return given

    with pysteer.steer(pipe, Plan.build([shift("block.1", steps=(1,))])) as handle:
        for strength in (0.0, 1.0):
            handle.strength = strength
            run(pipe, name, callback_on_step_end=note)
    assert torch.equal(seen[0], seen[STEPS])
    assert not torch.allclose(seen[1], seen[STEPS + 1], atol=1e-4)
