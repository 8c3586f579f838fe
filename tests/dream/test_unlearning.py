"""Unlearning on a tiny pipeline: streamed means are the means, and the plan does what the formula says."""

import pytest
import torch
from dreaming import PROMPTS, SEEDS, SETTINGS, SITE, autoencoder, features, generator

from pysteer import steer
from pysteer.capture import Recorder
from pysteer.dream.unlearning import ConceptMeans, add_rows, edited_latents, unlearning_plan
from pysteer.errors import InputError

pytest.importorskip("diffusers")
CONCEPTS = [0, 1, 1, 0, 1]


@pytest.fixture(scope="module")
def pipe():
    return generator()


@pytest.fixture(scope="module")
def known(pipe):
    return features(pipe, autoencoder())


@pytest.fixture(scope="module")
def means(pipe, known):
    found = ConceptMeans.empty(["red", "blue"], 4, known.count)
    for part in (slice(0, 2), slice(2, 5)):
        add_rows(found, pipe, known, PROMPTS[part], CONCEPTS[part], SEEDS[part], SETTINGS)
    return found


def test_streamed_means_are_those_of_all_rows(tmp_path, pipe, known, means):
    with Recorder(pipe, [SITE]) as recorder:
        pipe(PROMPTS, seeds=SEEDS, decode=False, **SETTINGS)
    for step in range(4):
        x = recorder.get(SITE, step)
        rows = known.sae.dense(x).mean(1)
        for concept in (0, 1):
            own = torch.tensor([c == concept for c in CONCEPTS])
            torch.testing.assert_close(means.means[concept, step].float(), rows[own].mean(0), rtol=1e-4, atol=1e-5)
    means.save(tmp_path / "means.safetensors")
    again = ConceptMeans.load(tmp_path / "means.safetensors")
    assert again.names == ("red", "blue")
    assert torch.equal(again.total, means.total)


def test_the_plan_is_the_formula_at_every_step(pipe, known, means):
    plan = unlearning_plan(means, known, "red", percentile=85, factor=-2.0, rows="both")
    chosen = edited_latents(plan)
    assert all(len(step) == 3 for step in chosen)
    share = means.means / (means.means.sum(2, keepdim=True) + 1e-8)
    assert chosen[2] == (share[0, 2] - share[1, 2]).topk(3).indices.sort().values.tolist()
    before, calls = [], []
    module = pipe.pipe.unet.up_blocks[1].attentions[0]

    def edit(module, args, output):
        step = len(calls)
        calls.append(1)
        x = output[0].flatten(2).transpose(1, 2)
        values = known.sae.dense(x)
        floor = means.means[:, step].mean(0).float()
        before.append(x)
        for j in chosen[step]:
            a = values[..., j]
            new = torch.where(a > floor[j], -2.0 * means.means[0, step, j].float() * a, a)
            x = x + (new - a)[..., None] * known.sae.decoder[j]
        return (x.transpose(1, 2).reshape(output[0].shape),)

    with torch.no_grad():
        hook = module.register_forward_hook(edit)
        truth = pipe(PROMPTS[:2], seeds=SEEDS[:2], decode=False, **SETTINGS).latents
        hook.remove()
        with steer(pipe, plan):
            mine = pipe(PROMPTS[:2], seeds=SEEDS[:2], decode=False, **SETTINGS).latents
        plain = pipe(PROMPTS[:2], seeds=SEEDS[:2], decode=False, **SETTINGS).latents
    torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-3)
    assert (mine - plain).abs().max() > 1e-2


def test_what_cannot_be_unlearned(pipe, known, means):
    with pytest.raises(InputError, match="red, blue"):
        unlearning_plan(means, known, "green")
    with pytest.raises(InputError, match="latents"):
        unlearning_plan(means, features(pipe), "red")


def test_a_higher_floor_edits_fewer_tokens(pipe, known, means):
    given = {"percentile": 85, "factor": -2.0}
    low, high = (
        unlearning_plan(means, known, "red", floor=floor, **given).entries[0].parameters for floor in (1.0, 3.0)
    )
    torch.testing.assert_close(high.tensors["level"], 3 * low.tensors["level"])
    torch.testing.assert_close(high.tensors["scale"], low.tensors["scale"])
    whole = pipe(PROMPTS, seeds=SEEDS, decode=False, **SETTINGS).latents
    made = []
    for floor in (1.0, 1e6):
        with steer(pipe, unlearning_plan(means, known, "red", floor=floor, **given)):
            made.append(pipe(PROMPTS, seeds=SEEDS, decode=False, **SETTINGS).latents)
    assert not torch.equal(made[0], whole)
    torch.testing.assert_close(made[1], whole)  # no token is that active
