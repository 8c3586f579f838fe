"""Rows of a language model as settings of their own, masks of tokens, quantised layers, and hooks of the user."""

import warnings

import pytest
import torch
from tiny_language import IDS, LAYERS, LEFT, WIDTH, build, out, shift
from torch import Tensor, nn

import pysteer
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.models.language import LanguageModel
from pysteer.steering import Plan, SiteParameters
from pysteer.zoo.shapes.captions import build_text_tokenizer

ROWS = 16


def plan_of(row: int) -> Plan:
    """A plan that differs from those of other rows in sites, ops, sizes, phases and strengths."""
    generator = torch.Generator().manual_seed(row)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    site = f"{('block', 'mlp', 'attn')[row % 3]}.{row % LAYERS}"
    kinds = [
        shift(site, row),
        SiteParameters(
            site, "prototype_shift", None,
            {"weight": draw(2 + row % 2, WIDTH), "offset": draw(2 + row % 2), "delta": draw(2 + row % 2, WIDTH)},
        ),
        SiteParameters(
            site, "low_rank_shift", None,
            {"read": 0.3 * draw(2, WIDTH), "write": 0.3 * draw(2, WIDTH), "bias": draw(WIDTH)},
        ),
    ]  # fmt: skip
    entries = [kinds[row % 3], shift(f"mlp.{(row + 1) % LAYERS}", row + 100)][: 1 + row % 2]
    return Plan(entries, {entry.site: {(None, 0, 1)[row % 3]: (0.2 + 0.05 * row, 0.0)} for entry in entries})


def test_sixteen_settings_in_one_batch_equal_sixteen_runs() -> None:
    model, plans = build("llama"), [plan_of(row) for row in range(ROWS)]
    ids = IDS[:1].expand(ROWS, -1)
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        plain = model.generate(ids[:1], **settings)
        with pysteer.steer(model, plans):
            together = model.generate(ids, cache_implementation="static", **settings)
        changed = 0
        for row, plan in enumerate(plans):
            with pysteer.steer(model, plan):
                alone = model.generate(ids[:1], **settings)
            assert torch.equal(together.sequences[row], alone.sequences[0])
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], rtol=1e-5, atol=1e-5)
            changed += any(not torch.equal(a[0], b[0]) for a, b in zip(plain.logits, alone.logits, strict=True))
    assert changed == ROWS


def test_a_mask_with_padding_on_the_left() -> None:
    model, mask = build("qwen2"), torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
    plan = Plan.build([shift("mlp.0")])
    real, chosen = LEFT.bool(), mask & LEFT.bool()
    gain, bias = (plan.parameters[0].tensors[name][0] for name in ("gain", "bias"))

    def by_hand(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if output.shape[1] != mask.shape[1]:  # a further token, which the mask is not about
            return output
        return torch.where(chosen.unsqueeze(-1), gain * output + bias, output)

    settings = {"attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False}
    plain = out(model, attention_mask=LEFT)
    hook = model.get_submodule(find_family(model).sites(model)["mlp.0"].path).register_forward_hook(by_hand)
    with torch.no_grad():
        expected, continued = out(model, attention_mask=LEFT), model.generate(IDS, **settings)
        hook.remove()
        with pysteer.steer(model, plan, positions=mask) as handle:
            steered = out(model, attention_mask=LEFT)
            assert handle.report()[0].tokens_touched == int(chosen.sum()) == 3
            assert torch.equal(model.generate(IDS, **settings), continued)
            assert handle.report()[0].tokens_touched == 6
    torch.testing.assert_close(steered[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not torch.equal(steered[1], plain[1])


def test_special_tokens_can_be_left_alone() -> None:
    lm = LanguageModel(build("llama"), build_text_tokenizer())
    prompts = ["a red circle", "a small blue square on a white background"]
    mask = lm.content_mask(prompts)
    assert mask.sum(1).tolist() == [3, 8]  # without the end mark and the padding
    with pysteer.steer(lm, Plan.build([shift("embed")]), positions=mask) as handle:
        steered = lm.read(prompts).logits
        assert handle.report()[0].tokens_touched == 11
    assert not torch.equal(steered, lm.read(prompts).logits)


def test_projections_by_regular_expression() -> None:
    model = build("llama")
    from pysteer.capture.taps import choose_sites

    family = find_family(model)
    chosen = choose_sites(family, model, r".*self_attn\.[qkv]_proj")
    assert len(chosen) == 3 * LAYERS
    plain = out(model)
    for site in chosen[:3]:
        with pysteer.steer(model, Plan.build([shift(site.name, width=site.width)])):
            assert not torch.equal(out(model), plain), site.name
    with pytest.raises(InputError, match="unknown site"):
        choose_sites(family, model, r".*self_attn\.x_proj")
    with pytest.raises(InputError, match="regular expression"):
        choose_sites(family, model, "block.(")
    with pytest.raises(InputError, match="width 32"), pysteer.steer(model, Plan.build([shift("mlp.0", width=16)])):
        pass


def test_quantised_layers_stay_as_they_are() -> None:
    model = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    layer = quantised.model.layers[1].mlp.down_proj
    kind, weights = type(layer), layer.weight().dequantize().clone()
    plain = out(quantised)
    parameters = [shift("model.layers.1.mlp.down_proj"), shift("block.0", 1)]
    with pysteer.steer(quantised, Plan.build(parameters)) as handle:
        steered = out(quantised)
        assert [entry.calls for entry in handle.report()] == [1, 1]
    assert not torch.allclose(steered, plain, atol=1e-3)
    assert type(layer) is kind
    assert torch.equal(layer.weight().dequantize(), weights)
    assert torch.equal(out(quantised), plain)
    with pytest.raises(InputError, match="cannot be folded"):
        pysteer.bake(quantised, Plan.build(parameters[:1]))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_of_the_user_still_run(before: bool) -> None:
    model, seen = build("gpt2"), []
    site = find_family(model).sites(model)["block.1"].path
    register = model.get_submodule(site).register_forward_hook
    plan = Plan.build([shift("block.1")])
    plain = out(model)
    if before:
        hook = register(lambda *_: seen.append(1))
    with pysteer.steer(model, plan):
        if not before:
            hook = register(lambda *_: seen.append(1))
        assert not torch.equal(out(model), plain)
    hook.remove()
    assert seen == [1]
    assert torch.equal(out(model), plain)
