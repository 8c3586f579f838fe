"""Generation with rows that are refilled: every text equals the one generated alone, steered or not."""

import pytest
import torch
from tiny_language import DECODERS, WIDTH, build, shift
from tiny_text import save_tiny_model
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

import pysteer
from pysteer.errors import InputError
from pysteer.models.language import LanguageModel
from pysteer.recipes.transport.decoder import Request, RowDecoder, in_order
from pysteer.recipes.transport.sampling import Sampling, draw, nucleus, penalise_
from pysteer.steering import Plan

GREEDY = Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0)
PROMPTS = [(5, 12), (7, 9, 4), (30, 31, 32, 33, 34), (40, 8)]
STRENGTHS = [0.0, 0.5, 1.0, 2.0]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return LanguageModel.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def plan() -> Plan:
    return Plan.build([shift("block.1", 1), shift("mlp.0", 2)])


def alone(lm, request: Request, tokens: int) -> tuple[int, ...]:
    """The same text by the model's own `generate`, steered from the second token on."""
    ids = torch.tensor([request.prompt])
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        if request.strength == 0:
            out = lm.model.generate(ids, **settings)
        else:
            with pysteer.steer(lm, plan(), strength=request.strength, positions=slice(1, None)):
                out = lm.model.generate(ids, **settings)
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_every_row_equals_its_single_run(lm, rows) -> None:
    asked = [Request(prompt, strength) for prompt in PROMPTS for strength in STRENGTHS]
    decoder = RowDecoder(lm, rows=rows, max_new_tokens=7, sampling=GREEDY, stop_at_end=False)
    made = in_order(decoder, asked, plan())
    assert [one.request for one in made] == asked
    for one in made:
        assert one.tokens == alone(lm, one.request, 7), one.request
    texts = {request.prompt: set() for request in asked}
    for one in made:
        texts[one.request.prompt].add(one.tokens)
    assert all(len(different) > 1 for different in texts.values())  # steering did something for every prompt


@pytest.mark.parametrize("name", DECODERS)
def test_models_of_all_kinds(name) -> None:
    model = build(name)
    lm = type("Bare", (LanguageModel,), {"__init__": lambda self: None})()
    lm.model, lm.tokenizer = model, type("Tokens", (), {"eos_token_id": None})()
    asked = [Request((5, 9, 17)), Request((61, 4)), Request((33, 2, 8, 7))]
    made = in_order(RowDecoder(lm, rows=2, max_new_tokens=5, sampling=GREEDY), asked)
    for one in made:
        ids = torch.tensor([one.request.prompt])
        out = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert one.tokens == tuple(out[0, ids.shape[1] :].tolist())


def test_strength_zero_is_the_unsteered_text(lm) -> None:
    asked = [Request(prompt, 0.0, seed) for seed, prompt in enumerate(PROMPTS)]
    decoder = RowDecoder(lm, rows=4, max_new_tokens=9, sampling=Sampling(1.0, 0.9, 1.2))
    assert in_order(decoder, asked, plan()) == in_order(decoder, asked)


def test_a_text_depends_on_its_own_seed_alone(lm) -> None:
    asked = [Request(prompt, strength, 17) for prompt in PROMPTS for strength in STRENGTHS]
    results = [
        in_order(RowDecoder(lm, rows=rows, max_new_tokens=6, sampling=Sampling(1.0, 0.95, 1.1)), asked, plan())
        for rows in (1, 5, 16)
    ]
    assert results[0] == results[1] == results[2]
    other = [Request(request.prompt, request.strength, 18) for request in asked]
    assert [one.tokens for one in in_order(RowDecoder(lm, rows=5, max_new_tokens=6), other, plan())] != [
        one.tokens for one in results[0]
    ]


def test_position_last_steers_from_the_end_of_the_prompt(lm) -> None:
    for prompt in PROMPTS:
        request = Request(prompt, 0.3)
        settings = {"rows": 1, "max_new_tokens": 6, "sampling": GREEDY, "stop_at_end": False}
        ids = torch.tensor([prompt])
        with torch.no_grad(), pysteer.steer(lm, plan(), strength=0.3, positions="last"):
            out = lm.model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        made = in_order(RowDecoder(lm, position="last", **settings), [request], plan())[0].tokens
        assert made == tuple(out[0, ids.shape[1] :].tolist())
    asked = [Request(prompt, 0.5, seed) for seed, prompt in enumerate(PROMPTS * 4)]
    last, every = (
        in_order(RowDecoder(lm, max_new_tokens=6, sampling=Sampling(1.0, 1.0, 1.0), position=where), asked, plan())
        for where in ("last", "all")
    )
    assert last != every


def test_texts_end_at_the_end_token(lm) -> None:
    decoder = RowDecoder(lm, rows=3, max_new_tokens=40, sampling=Sampling(1.0, 1.0, 1.0))
    made = in_order(decoder, [Request((5, 6), 0.0, seed) for seed in range(12)])
    assert 2 not in {token for one in made for token in one.tokens}
    assert len({len(one.tokens) for one in made}) > 1


def test_what_cannot_be_generated_is_refused(lm) -> None:
    decoder = RowDecoder(lm, max_new_tokens=60)
    with pytest.raises(InputError, match="length of a prompt"):
        in_order(decoder, [Request(tuple(range(4, 14)))])
    with pytest.raises(InputError, match="length of a prompt"):
        in_order(decoder, [Request(())])
    with pytest.raises(InputError, match="strength without a plan"):
        in_order(RowDecoder(lm, max_new_tokens=4), [Request((5,), 1.0)])
    with pytest.raises(InputError, match="rows"):
        RowDecoder(lm, rows=0)


@pytest.mark.parametrize("size", [50, 3000, 20000])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_the_nucleus_is_that_of_a_full_sort(size, top_p) -> None:
    # From peaked to flat, so that the rows need nuclei of different sizes.
    chances = (torch.linspace(6, 0.5, 6)[:, None] * torch.randn(6, size)).softmax(1)
    parts = list(nucleus(chances, top_p))
    assert torch.cat([rows for rows, _, _ in parts]).sort().values.tolist() == list(range(6))
    tokens = {int(row): own for rows, found, _ in parts for row, own in zip(rows, found, strict=True)}
    kept = {int(row): own for rows, _, some in parts for row, own in zip(rows, some, strict=True)}
    ordered, order = chances.double().sort(dim=1, descending=True)
    inside = ordered.cumsum(1) - ordered < top_p
    for row in range(6):
        expected = dict(zip(order[row][inside[row]].tolist(), ordered[row][inside[row]].tolist(), strict=True))
        got = {t: c for t, c in zip(tokens[row].tolist(), kept[row].tolist(), strict=True) if c > 0}
        missing = {t for t in expected if t not in got and expected[t] > 1e-6}
        assert not missing
        assert all(abs(got[t] - chances[row, t].item()) < 1e-9 for t in got)
        assert sum(got.values()) >= top_p - 1e-4


def test_rows_without_numbers_still_give_a_token_and_leave_the_others_alone() -> None:
    logits = torch.randn(3, 5000)
    numbers, held = torch.tensor([0.3, 0.5, 0.7]), torch.zeros(3, 1, dtype=torch.int64)
    sampling = Sampling(top_p=0.9, repetition_penalty=1.0)
    expected = draw(logits, held, numbers, sampling)
    logits[1] = torch.nan
    drawn = draw(logits, held, numbers, sampling)
    assert drawn[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert 0 <= int(drawn[1]) < 5000


def test_drawing_agrees_with_transformers() -> None:
    logits = 2 * torch.randn(1, 400)
    held = torch.tensor([[3, 7, 7, 250]])
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TopPLogitsWarper(0.8)])
    expected = processors(held, logits.clone()).softmax(1)[0]
    numbers = (torch.arange(20000) + 0.5) / 20000
    drawn = draw(logits.expand(20000, -1), held.expand(20000, -1), numbers, Sampling(1.0, 0.8, 1.3))
    found = torch.bincount(drawn, minlength=400) / 20000
    assert (found - expected).abs().max() < 2e-4
    assert torch.equal(found > 0, expected > 5e-5) or (found - expected).abs().sum() < 5e-3


def test_a_penalty_counts_repeats_once() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert penalise_(logits, torch.tensor([[0, 0, 1]]), 2.0).tolist() == [[1.0, -4.0, 1.0]]


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"repetition_penalty": 0}])
def test_sampling_refuses(settings) -> None:
    with pytest.raises(InputError):
        Sampling(**settings)


def test_width_of_the_tiny_models_agree() -> None:
    assert WIDTH == 32  # shifts of tiny_language fit the model of tiny_text
