"""Priors on a tiny pipeline: a batch of many features is each of them alone, and what is added is what was asked."""

import pytest
import torch
from dreaming import SETTINGS, SITE, autoencoder, features, generator

from pysteer.dream.analysis import Analysis
from pysteer.dream.prior import EVERY, PriorPlan, PriorRow, draw_priors
from pysteer.errors import InputError

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    return generator()


def analysis(latents=20):
    """Four steps; feature f is active where the bits of f say, most strongly at the late timesteps."""
    bits = torch.tensor([[(f >> step) & 1 for step in range(4)] for f in range(latents)]).float()
    most = bits * torch.tensor([0.4, 0.3, 0.2, 0.1])
    empty = torch.zeros(latents, 4, 0)
    return Analysis(
        "sae", "cond", torch.tensor([1.0, 251.0, 501.0, 751.0]), bits, most, most, bits, empty, empty.long(), 9
    )


def test_rows_follow_the_timesteps_of_the_feature():
    plan = PriorPlan(scale=10.0, seeds=(5, 6))
    rows = plan.rows(analysis(), 0b0101)
    assert [(row.seed, row.timestep) for row in rows] == [(5, EVERY), (6, EVERY)]
    # Timestep 1 is the last of the four steps, 501 the second.
    assert rows[0].strengths == {3: pytest.approx(4.0), 1: pytest.approx(2.0)}
    assert set(PriorPlan(timesteps="all_timesteps").rows(analysis(), 5)[0].strengths) == {0, 1, 2, 3}
    assert plan.rows(analysis(), 0) == []
    peaks = PriorPlan(timesteps="activity_peaks", scale=10.0, seeds=(5,)).rows(analysis(), 0b0101)
    assert [row.timestep for row in peaks] == [1.0, 501.0]
    assert [set(row.strengths) for row in peaks] == [{3}, {1}]
    with pytest.raises(InputError, match="activity_peaks"):
        PriorPlan(timesteps="sometimes")


@pytest.mark.parametrize("latents", [True, False])
def test_a_batch_of_features_is_each_of_them_alone(pipe, latents):
    known = features(pipe, autoencoder()) if latents else features(pipe)
    plan = PriorPlan(settings=SETTINGS)
    rows = [PriorRow(f, seed, EVERY, {step: 3.0 + f}) for f, step in ((2, 0), (7, 1), (9, 2)) for seed in (1, 2)]
    together = draw_priors(pipe, known, rows, plan)
    for i, row in enumerate(rows):
        alone = draw_priors(pipe, known, [row], plan)
        torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-4, atol=1e-4)
    plain = pipe([""] * 2, seeds=[1, 2], guidance_scale=1.0, **SETTINGS)
    for f in range(3):
        assert (together.latents[2 * f : 2 * f + 2] - plain.latents).abs().amax((1, 2, 3)).min() > 1e-2
    unsteered = draw_priors(pipe, known, [PriorRow(2, 1, EVERY, {0: 0.0})], plan)
    assert torch.equal(unsteered.images[0], plain.images[0])


def test_what_is_added_is_the_direction_at_the_steps_asked_for(pipe):
    known = features(pipe, autoencoder())
    row = PriorRow(4, 3, EVERY, {1: 2.5})
    steered = draw_priors(pipe, known, [row], PriorPlan(settings=SETTINGS))
    calls = []

    def add(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            return (output[0] + 2.5 * known.direction(4)[None, :, None, None],)
        return output

    hook = pipe.pipe.unet.up_blocks[1].attentions[0].register_forward_hook(add)
    plain = pipe([""], seeds=[3], guidance_scale=1.0, **SETTINGS)
    hook.remove()
    torch.testing.assert_close(steered.latents, plain.latents, rtol=1e-4, atol=1e-4)
    assert known.site.name == SITE
    with pytest.raises(InputError, match="at least one"):
        draw_priors(pipe, known, [], PriorPlan())


def test_with_a_prompt_and_guidance_conditional_rows_alone_are_steered(pipe):
    known, guided = features(pipe, autoencoder()), {**SETTINGS, "guidance_scale": 3.0}
    row = PriorRow(4, 3, EVERY, dict.fromkeys(range(4), 2.5))
    steered = draw_priors(pipe, known, [row], PriorPlan(prompt="a red circle", settings=guided))

    def add(module, args, output):
        assert len(output[0]) == 2  # unconditional, conditional
        return (output[0] + torch.tensor([0.0, 2.5]).view(2, 1, 1, 1) * known.direction(4)[None, :, None, None],)

    plain = pipe(["a red circle"], seeds=[3], **guided)
    hook = pipe.pipe.unet.up_blocks[1].attentions[0].register_forward_hook(add)
    expected = pipe(["a red circle"], seeds=[3], **guided)
    hook.remove()
    torch.testing.assert_close(steered.latents, expected.latents, rtol=1e-4, atol=1e-3)
    assert (steered.latents - plain.latents).abs().max() > 1e-2
