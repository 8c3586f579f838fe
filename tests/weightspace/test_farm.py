"""Adapters trained side by side are those trained alone; on a pipeline they do what diffusers does with their files."""

import json

import pytest
import torch
from tiny_diffusion import stable_diffusion

from pysteer.errors import InputError
from pysteer.models.diffusion import ImageGenerator
from pysteer.steering import steer
from pysteer.weightspace import (
    Directions,
    LoraSet,
    attached,
    invert,
    layer_inputs,
    plan_of,
    predicted_shifts,
    read_adapter,
)
from pysteer.weightspace.farm.collection import adapter_path, is_written, write_batch
from pysteer.weightspace.farm.concepts import Lesson, drawn_lesson, image_id
from pysteer.weightspace.farm.training import Teacher, TrainingConfig

CONFIG = TrainingConfig(steps=3, rows=2, lr=0.05, precision="fp32", prompt="a circle")


def _lessons(count=3, ranks=(1, 2, 4)):
    made = []
    for i in range(count):
        images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        ids = tuple(image_id(each) for each in images)
        made.append(Lesson(f"{i:03d}", f"class {i % 2}", f"thing {i % 2}", images, ids, 11 * i, ranks[i % len(ranks)]))
    return made


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


@pytest.fixture
def collection(pipe, tmp_path):
    lessons = _lessons(6)
    write_batch(tmp_path, lessons, Teacher(pipe, CONFIG).train(lessons), CONFIG, "tiny")
    return tmp_path


def test_together_is_alone(pipe):
    lessons = _lessons()
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    together = Teacher(pipe, CONFIG).train(lessons)
    for i, lesson in enumerate(lessons):
        alone = Teacher(pipe, CONFIG).train([lesson])
        torch.testing.assert_close(together.losses[:, i], alone.losses[:, 0], rtol=1e-4, atol=1e-5)
        one, two = together.factors.of(i, lesson.rank), alone.factors.of(0, lesson.rank)
        for path in one:
            assert one[path][0].shape[0] == lesson.rank
            assert float(one[path][1].abs().max()) > 0
            torch.testing.assert_close(one[path][1] @ one[path][0], two[path][1] @ two[path][0], rtol=2e-2, atol=2e-3)
        # What lies beyond an adapter's own rank stays zero through training.
        assert all(not together.factors.down[path][i, lesson.rank :].any() for path in one)
    assert all(torch.equal(before[name], weight) for name, weight in pipe.unet.state_dict().items())


def test_training_lowers_the_loss_on_its_pictures(pipe):
    lessons = _lessons(2)
    config = TrainingConfig(steps=60, rows=3, lr=0.03, precision="fp32", schedule="constant")
    losses = Teacher(pipe, config).train(lessons).losses
    assert bool((losses[-15:].mean(0) < losses[:15].mean(0)).all())


def test_initial_factors(pipe):
    own, shared = (Teacher(pipe, TrainingConfig(init=init)) for init in ("own", "shared"))
    lessons = _lessons(2, ranks=(2,))
    down = next(iter(own.initial(lessons).down.values()))
    assert not torch.equal(down[0], down[1])
    down = next(iter(shared.initial(lessons).down.values()))
    assert torch.equal(down[0], down[1])


def test_files_load_into_diffusers_and_do_the_same(collection):
    """The pictures of plain diffusers with the file are those of `attached` with the adapter."""
    lesson = _lessons(6)[2]
    path = adapter_path(collection, lesson.name, lesson.label)
    assert is_written(collection, lesson.name, lesson.label)
    assert json.loads(path.with_suffix(".json").read_text())["image_ids"] == list(lesson.image_ids)
    generator = ImageGenerator(stable_diffusion())
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    plain = generator(["a circle"], seeds=0, decode=False, **settings).latents
    with torch.no_grad(), attached(generator, read_adapter(path), 3.0):
        ours = generator(["a circle"], seeds=0, decode=False, **settings).latents
    again = generator(["a circle"], seeds=0, decode=False, **settings).latents
    generator.pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="own")
    generator.pipe.set_adapters(["own"], [3.0])
    theirs = generator(["a circle"], seeds=0, decode=False, **settings).latents
    assert torch.equal(plain, again)
    assert float((ours - plain).abs().max()) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_many_adapters_in_one_call(collection):
    adapters = LoraSet.open(collection)
    generator = ImageGenerator(stable_diffusion())
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "decode": False}
    three = [adapters.adapter(i) for i in range(3)]
    with torch.no_grad(), attached(generator, three, 5.0, rows=2):
        together = generator(["a circle"] * 6, seeds=[0, 1] * 3, **settings).latents
    for i, adapter in enumerate(three):
        with torch.no_grad(), attached(generator, adapter, 5.0):
            alone = generator(["a circle"] * 2, seeds=0, **settings).latents
        torch.testing.assert_close(together[2 * i : 2 * i + 2], alone, rtol=1e-3, atol=1e-4)


def test_predicted_shift_and_its_plan(collection):
    """dW h is the shift of the first layer exactly; as a steering plan it makes the same mean shift at one strength."""
    adapter = LoraSet.open(collection).adapter(0)
    generator = ImageGenerator(stable_diffusion())
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0}
    layer = next(iter(adapter.layers))
    module = generator.pipe.unet.get_submodule(layer.removeprefix("unet."))
    inputs = layer_inputs(generator, [layer], ["a circle"] * 2, **settings)
    shift = predicted_shifts(adapter, inputs)[layer]
    assert shift.shape == (2, module.out_features)

    def mean_output(context):
        seen = []
        with torch.no_grad(), context:
            target = generator.pipe.unet.get_submodule(layer.removeprefix("unet."))
            hook = target.register_forward_hook(lambda m, given, out: seen.append(out.float().flatten(0, -2).mean(0)))
            generator(["a circle"] * 2, seeds=0, decode=False, **settings)
            hook.remove()
        return torch.stack(seen)

    from contextlib import nullcontext

    plain = mean_output(nullcontext())
    with_weights = mean_output(attached(generator, adapter, 2.0))
    first = with_weights[0] - plain[0]
    torch.testing.assert_close(first, 2.0 * shift[0], rtol=1e-3, atol=1e-4)
    plan = plan_of({layer: shift})
    assert float(shift.abs().max()) > 1e-4
    latents = generator(["a circle"] * 2, seeds=0, decode=False, **settings).latents
    with torch.no_grad(), steer(generator, plan, strength=2.0):
        steered = generator(["a circle"] * 2, seeds=0, decode=False, **settings).latents
    assert float((steered - latents).abs().max()) > 1e-5


def test_inversion_finds_an_adapter_of_the_span(collection, pipe):
    directions = Directions(LoraSet.open(collection))
    images = _lessons(1)[0].images
    found = invert(directions, pipe, images, prompt="a circle", components=3, steps=6, rows=4, lr=0.5)
    assert found.z.shape == (3,)
    assert float(found.z.abs().max()) > 0.1
    wanted = directions.mean().coefficients + sum(
        float(z) * directions.component(k).coefficients for k, z in enumerate(found.z)
    )
    torch.testing.assert_close(found.coefficients, wanted)
    assert found.adapter(2).layers.keys() == set(directions.adapters.layers)


def test_what_does_not_fit_is_refused(collection, pipe):
    adapter = LoraSet.open(collection).adapter(0)
    from tiny_diffusion import sdxl_pipeline

    with pytest.raises(InputError, match="pipeline"):
        Teacher(sdxl_pipeline(), CONFIG)
    with pytest.raises(InputError, match="targets"):
        Teacher(pipe, TrainingConfig(targets=("no_such",)))
    from dataclasses import replace

    other = replace(adapter, layers={"unet.nowhere.to_q": next(iter(adapter.layers.values()))})
    with pytest.raises(InputError, match="layer of the adapter"), attached(pipe, other):
        pass


def test_drawn_lessons_have_pictures_of_their_own():
    one, two = (drawn_lesson(i, ("shape=star", "colour=red"), 4, (1, 3), 0) for i in (0, 2))
    assert one.label == two.label == "shape=star"
    assert not set(one.image_ids) & set(two.image_ids)
    assert (one.rank, two.rank) == (1, 3)
    again = drawn_lesson(0, ("shape=star", "colour=red"), 4, (1, 3), 0)
    assert again.image_ids == one.image_ids
