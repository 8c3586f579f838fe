"""Shared prefixes and packed rows: the same tokens, latents and texts as every row on its own."""

import sys
from pathlib import Path

import pytest
import torch

from pysteer.errors import PysteerError
from pysteer.models.diffusion import ImageGenerator
from pysteer.models.language import LanguageModel
from pysteer.steering import Plan, SiteParameters
from pysteer.sweep.prefix import Row, branches, generate, scaled, steering
from pysteer.sweep.runs import noise_seed, runs_of

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_diffusion
import tiny_infinity
import tiny_language


def shift(site: str, width: int, steps: tuple[int, ...] | None, seed: int = 0) -> SiteParameters:
    generator = torch.Generator().manual_seed(seed)
    sets = 1 if steps is None else len(steps)
    bias = 0.3 * torch.randn(sets, width, generator=generator)
    return SiteParameters(site, "affine_shift", steps, {"gain": torch.ones(sets, width), "bias": bias})


def rows_of(prompts, plans, strengths) -> list[Row]:
    return [Row(p, noise_seed(p, 0), scaled(plan, s)) for p in prompts for plan in plans for s in strengths]


def infinity_rows() -> tuple[tiny_infinity.InfinityPipeline, list[Row]]:
    pipe = tiny_infinity.tiny_pipeline()
    every = Plan.build([shift(f"ca.{i}", tiny_infinity.WIDTH, (0, 1, 2), i) for i in range(3)])
    last = Plan.build([shift("ca_block.1", tiny_infinity.WIDTH, (2,), 7)])
    text = Plan.build([shift("text.output", tiny_infinity.TEXT_WIDTH, None, 9)])
    pooled = Plan.build([shift("pooled", tiny_infinity.WIDTH, (0,), 5)])
    prompts = ["a large red circle", "a small blue square on a white background"]
    return pipe, rows_of(prompts, [every, last, text, pooled], [0.0, 3.0, 9.0])


def test_infinity_rows_are_the_same_tokens_packed_shared_and_alone():
    pipe, rows = infinity_rows()
    runs = runs_of(pipe, {"tau": 1.0, "top_p": 1.0})
    shared, apart = generate(runs, rows), generate(runs, rows, share=False)
    assert shared.work[0] < 0.8 * apart.work[0] == 0.8 * shared.work[1]
    bits = [b[shared.index] for b in shared.state.decoding.bits]
    flips = 0
    for i, row in enumerate(rows):
        with steering(runs, [row.plan]) if any(e.active for e in row.plan.entries) else steering(runs, [Plan()]):
            alone = pipe([row.prompt], seeds=[row.noise], tau=1.0, top_p=1.0, decode=False).bits
        for scale in range(3):
            flips += int((bits[scale][i] != alone[scale][0]).sum())
            assert torch.equal(bits[scale][i], apart.state.decoding.bits[scale][i])
    assert flips == 0
    by_plan = {tuple(bits[2][i].flatten().tolist()) for i in range(12)}
    assert len(by_plan) == 9  # four plans at strength 0 are one image, the eight others differ


@pytest.mark.parametrize(("uncond", "cfg"), [(0.0, 3.0), (0.7, 3.0), (0.0, 1.0), (0.0, [3.0, 3.0, 1.0])])
def test_unconditional_rows_are_shared_at_the_step_where_branches_part_unless_they_are_steered(uncond, cfg):
    pipe = tiny_infinity.tiny_pipeline()
    late = [shift(f"ca.{i}", tiny_infinity.WIDTH, (0, 1, 2), i) for i in range(3)]
    rows = [
        Row("a red circle", 5, Plan(late, {f"ca.{i}": {1: (s, uncond * s), 2: (s, 0.0)} for i in range(3)}))
        for s in (0.0, 2.0, 4.0, 6.0)
    ]
    announced = []
    pipe.transformer.row_listeners.append(lambda part, cond, uncond, lengths: announced.append((cond, uncond)))
    runs = runs_of(pipe, {"tau": 1.0, "top_p": 1.0, "cfg": cfg})
    shared = generate(runs, rows)
    seen = announced.copy()
    apart = generate(runs, rows, share=False)
    sharing = uncond == 0 and cfg != 1.0
    assert ((4, 1) in seen) == sharing
    assert shared.work[0] == apart.work[0] - 3 * runs.weights[0] - (1.5 * runs.weights[1] if sharing else 0)
    for level, (a, b) in enumerate(zip(shared.state.decoding.bits, apart.state.decoding.bits, strict=True)):
        assert torch.equal(a[shared.index], b), level
    assert len({tuple(row.flatten().tolist()) for row in apart.state.decoding.bits[2]}) >= 3


def test_a_row_does_not_depend_on_batch_mates_or_its_place():
    pipe, rows = infinity_rows()
    runs = runs_of(pipe, {})
    there = generate(runs, rows)
    chosen = [rows[i] for i in (20, 3, 11)]
    here = generate(runs, chosen)
    for scale in range(3):
        a, b = there.state.decoding.bits[scale][there.index], here.state.decoding.bits[scale][here.index]
        assert torch.equal(a[[20, 3, 11]], b)


def test_branches_part_where_the_steering_first_differs():
    _, rows = infinity_rows()
    runs = runs_of(tiny_infinity.tiny_pipeline(), {})
    tree = branches(rows, runs)
    # of 3 strengths x 4 plans: ca (2 ways at scale 0), text (2), pooled (2), and the unsteered one; ca_block parts last
    assert [max(level) + 1 for level in tree] == [14, 14, 18]


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_diffusion_rows_have_the_same_latents_shared_and_alone(scheduler):
    pipe = tiny_diffusion.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(tiny_diffusion.df, scheduler)()
    generator = ImageGenerator(pipe)
    late = Plan.build([shift("ca.0", tiny_diffusion.WIDTH, (3, 4), 1)])
    early = Plan.build([shift("ca.1", tiny_diffusion.WIDTH, (1,), 2)])
    text = Plan.build([shift("text.output", tiny_diffusion.WIDTH, None, 3)])
    rows = rows_of(["a red circle", "two blue square"], [late, early, text], [0.0, 1.0])
    settings = {"num_inference_steps": 5, "height": 16, "width": 16}
    runs = runs_of(generator, settings, decode=False)
    shared = generate(runs, rows)
    assert shared.work[0] < 0.7 * shared.work[1]
    latents = shared.state.inner.output.latents[shared.index]
    apart = generate(runs, rows, share=False).state.inner.output.latents
    for i, row in enumerate(rows):
        with steering(runs, [row.plan] if any(e.active for e in row.plan.entries) else [Plan()]):
            alone = generator([row.prompt], seeds=[row.noise], decode=False, **settings).latents
        # A random model amplifies the rounding of a batch of another size; sharing must not add to that.
        packed, scale = float((apart[i] - alone[0]).abs().max()), float(alone.abs().max())
        assert float((latents[i] - alone[0]).abs().max()) <= 1e-5 * scale + 4 * packed
    assert len({round(float(latents[i].sum()), 3) for i in range(6)}) == 4


class Words:
    """A tokenizer of numbers: "3 5 8"."""

    pad_token_id, eos_token_id, padding_side = 0, None, "left"

    def __call__(self, texts, padding=False, return_tensors=None):
        ids = [[int(word) for word in text.split()] for text in texts]
        longest = max(map(len, ids))
        padded = [[0] * (longest - len(row)) + row for row in ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    def batch_decode(self, ids, skip_special_tokens=True):
        return [" ".join(map(str, row)) for row in ids.tolist()]


@pytest.mark.parametrize("temperature", [0.0, 0.02])
def test_texts_are_the_same_shared_and_alone(temperature):
    lm = LanguageModel(tiny_language.build("llama"), Words())
    plan = Plan.build([shift("block.1", tiny_language.WIDTH, (0, 1), 4)])
    writing = Plan.build([shift("block.0", tiny_language.WIDTH, (1,), 5)])
    settings = {"max_new_tokens": 6, "temperature": temperature}
    runs = runs_of(lm, settings)
    rows = [
        Row(p, noise_seed(p, seed), scaled(each, s))
        for p in ("5 9 17", "7 61 4 88 2") for each in (plan, writing) for s in (0.0, 6.0) for seed in (0, 1)
    ]  # fmt: skip
    shared = generate(runs, rows)
    assert max(branches(rows, runs)[0]) + 1 == 4  # two prompts, each read with and without the first plan
    texts, _ = runs.finish(shared.state)
    found = [texts[i] for i in shared.index.tolist()]
    for row, text in zip(rows, found, strict=True):
        with steering(runs, [row.plan] if any(e.active for e in row.plan.entries) else [Plan()]):
            assert lm.begin([row.prompt], seeds=[row.noise], **settings).write().texts() == [text]
    assert len(set(found[:8])) == (3 if temperature == 0 else 6)
    if temperature == 0:
        unsteered = lm.generate(["5 9 17"], max_new_tokens=6)
        assert unsteered == [found[0]]


def test_a_poisoned_row_is_found_and_the_others_stand():
    pipe, rows = infinity_rows()
    runs = runs_of(pipe, {})
    broken = Row(rows[1].prompt, rows[1].noise, scaled(rows[2].plan, 1e38))
    mixed = generate(runs, [rows[0], broken, rows[2]])
    _, finite = runs.finish(mixed.state)
    assert finite[mixed.index].tolist() == [True, False, True]
    clean = generate(runs, [rows[0], rows[2]])
    a, b = mixed.state.decoding.summed[mixed.index], clean.state.decoding.summed[clean.index]
    assert torch.equal(a[[0, 2]], b)


def test_images_that_share_an_unconditional_row_fork_again_only_after_the_next_scale():
    pipe = tiny_infinity.tiny_pipeline()
    made = pipe.begin(["a red circle"], seeds=[5], cfg=3.0, tau=1.0, top_p=1.0).advance(1)
    two = made.fork(torch.tensor([0, 0]), torch.tensor([5, 6]), twins=True)
    assert two.rows == 3
    with pytest.raises(PysteerError, match="advance before forking again"):
        two.fork(torch.tensor([0, 1]))
    three = two.advance(2).fork(torch.tensor([1, 0, 1])).advance()
    alone = [pipe(["a red circle"], seeds=[s], cfg=3.0, tau=1.0, top_p=1.0).bits for s in (5, 6)]
    assert torch.equal(three.bits[0][0], alone[0][0][0])
    for scale in (1, 2):  # after the first scale a row draws from its own seed
        assert torch.equal(three.bits[scale][0], three.bits[scale][2])
        assert not torch.equal(three.bits[scale][0], three.bits[scale][1])
    assert torch.equal(three.bits[2][1], alone[0][2][0])
