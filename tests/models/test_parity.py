"""The port against the published code with the same random weights.

Without the published code: a recorded run of it (`scripts/record_parity.py`). With it (`PYSTEER_OFFICIAL_INFINITY`):
every block output, logit and bit of many settings, computed again.
"""

from __future__ import annotations

import types
from collections.abc import Sequence

import official
import parity_case as case
import pytest
import torch
from torch import Tensor, nn

from pysteer import files
from pysteer.models.infinity.bsq import MultiScaleBSQ
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.schedule import scale_schedule
from pysteer.models.infinity.transformer import TextCondition
from pysteer.models.infinity.vae import InfinityVAE, VAEConfig

TOLERANCE = 1e-5  # of the largest magnitude in the tensor: fp32 sums in another order

needs_official = pytest.mark.skipif(official.official_path() is None, reason=f"needs {official.VARIABLE}")


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude (at least 1)."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0)).item()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return files.read_safetensors(case.FIXTURE)[0]


@pytest.mark.parametrize("mode", ["forced", "greedy"])
def test_recorded_run(recorded: dict[str, Tensor], mode: str) -> None:
    config = case.small_config()
    model, text = case.build(config, case.SEED), case.texts(config, case.LENGTHS, case.SEED)
    forced = case.forced_bits(config, config.scales, len(case.LENGTHS), case.SEED) if mode == "forced" else None
    ours = case.summary(case.run_port(model, text, forced=forced))
    expected = {k.removeprefix(f"{mode}."): v for k, v in recorded.items() if k.startswith(f"{mode}.")}
    assert set(ours) == set(expected)
    assert len(expected) > 40
    for name, tensor in expected.items():
        if name.startswith("bits"):
            assert torch.equal(ours[name], tensor), name
        else:
            assert difference(ours[name], tensor) < TOLERANCE, name


def test_recorded_run_notices_a_change(recorded: dict[str, Tensor]) -> None:
    config = case.small_config(rope_restart=True)
    model, text = case.build(config, case.SEED), case.texts(config, case.LENGTHS, case.SEED)
    ours = case.summary(case.run_port(model, text))
    off = [
        name for name, tensor in ours.items() if difference(tensor.float(), recorded[f"greedy.{name}"].float()) > 1e-3
    ]
    assert any(name.startswith("block") for name in off)
    assert not any(name.split(".")[1] == "0" for name in off)  # the first scale starts at position 0 anyway


def compare(
    config: InfinityConfig,
    *,
    cfg: Sequence[float] | None = None,
    lengths: Sequence[int] = case.LENGTHS,
    negative_lengths: Sequence[int] | None = None,
    insertion: Sequence[int] = (0,),
    forced: bool = False,
    fused_norm: bool = True,
    seed: int = case.SEED,
) -> tuple[case.PortRun, official.OfficialRun]:
    """Run both on the same weights and text, and hold every tensor to the tolerance."""
    ours = case.build(config, seed)
    theirs = official.build(config, case.weights(config, seed), fused_norm=fused_norm)
    text = case.texts(config, lengths, seed)
    negative = None if negative_lengths is None else case.texts(config, negative_lengths, seed + 1)
    bits = case.forced_bits(config, config.scales, len(lengths), seed) if forced else None
    cfg, tau = list(cfg or [case.CFG] * len(config.scales)), [case.TAU] * len(config.scales)
    a = case.run_port(ours, text, cfg=cfg, tau=tau, negative=negative, insertion=insertion, forced=bits)
    b = official.generate(
        theirs,
        config.scales,
        packed(text),
        cfg=cfg,
        tau=tau,
        negative=None if negative is None else packed(negative),
        insertion=insertion,
        forced=bits,
        patchify=config.patchify,
    )
    return a, b


def packed(text: TextCondition) -> tuple[Tensor, list[int], Tensor, int]:
    return official.pack_text(text.hidden, text.lengths.tolist())


def assert_same(a: case.PortRun, b: official.OfficialRun, *, bits: bool = True) -> None:
    for scale, (ours, theirs) in enumerate(zip(a.blocks, b.blocks, strict=True)):
        for layer, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            assert difference(x, y) < TOLERANCE, f"block {layer} at scale {scale}"
    for scale, (x, y) in enumerate(zip(a.logits, b.logits, strict=True)):
        assert difference(x, y) < TOLERANCE, f"logits at scale {scale}"
    if bits:
        assert all(torch.equal(x, y) for x, y in zip(a.bits, b.bits, strict=True))
    assert difference(a.features, b.features) < TOLERANCE


SETTINGS: dict[str, dict] = {
    "greedy": {},
    "cfg per scale, 1 at some": {"cfg": [1.0, 3.0, 1.0, 2.0, 3.0, 1.0, 4.0]},
    "cfg 1, no unconditional rows": {"cfg": [1.0] * 7},
    "cfg inside two layers": {"insertion": (-1, -3), "config": {"depth": 4}},
    "cfg inside and on the logits": {"insertion": (0, -2), "config": {"depth": 4}},
    "negative prompts": {"negative_lengths": (12, 3)},
    "three prompts, one token to many": {"lengths": (1, 32, 7)},
    "two heads in the text pool": {"config": {"text_dim": 256}},
    "wide ratio": {"config": {"scales": tuple(scale_schedule("0.06M", 0.5))}},
    "tall, ten scales": {"config": {"scales": tuple(scale_schedule("0.25M", 3.0))}},
    "patchify": {"config": {"patchify": True, "bits": 16}},
    "patchify, wide ratio": {"config": {"patchify": True, "bits": 16, "scales": tuple(scale_schedule("0.06M", 0.75))}},
}


@needs_official
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("forced", [True, False], ids=["forced", "greedy"])
def test_live(name: str, forced: bool) -> None:
    setting = dict(SETTINGS[name])
    config = case.small_config(**setting.pop("config", {}))
    a, b = compare(config, forced=forced, **setting)
    assert_same(a, b, bits=not forced)


@needs_official
def test_live_rope_restart() -> None:
    assert_same(*compare(case.small_config(rope_restart=True), fused_norm=False, forced=True), bits=False)
    a, b = compare(case.small_config(), fused_norm=False, forced=True)
    assert difference(a.blocks[0][1], b.blocks[0][1]) < TOLERANCE
    assert difference(a.blocks[1][0], b.blocks[1][0]) > 1e-2


@needs_official
@pytest.mark.parametrize("patchify", [False, True])
def test_live_training_forward(patchify: bool) -> None:
    config = case.small_config(patchify=patchify, bits=16)
    ours = case.build(config, case.SEED)
    theirs = official.build(config, case.weights(config, case.SEED))
    theirs.cond_drop_rate = 0.0
    text = case.texts(config, case.LENGTHS, case.SEED)
    inputs = case.normal(4, (2, config.tokens - 1, config.bits)) * 0.5
    with torch.no_grad():
        a = ours(text, inputs)
        b = theirs(packed(text), inputs, [(1, h, w) for h, w in config.scales])
    assert difference(a, b) < TOLERANCE


@needs_official
@pytest.mark.parametrize("patchify", [False, True])
def test_live_quantiser(patchify: bool) -> None:
    scales, dim = scale_schedule("0.06M", 0.75), 6
    code_scales = [(1, 2 * h, 2 * w) if patchify else (1, h, w) for h, w in scales]
    features = case.normal(8, (2, dim, *code_scales[-1][1:]))
    correction = official.load().correction.BitwiseSelfCorrection(
        official.FakeTokenizer(dim),
        types.SimpleNamespace(
            noise_apply_layers=0,
            noise_apply_requant=0,
            noise_apply_strength=0,
            apply_spatial_patchify=patchify,
            debug_bsc=False,
        ),
    )
    inputs, bits = correction.flip_requant(code_scales, None, features, "cpu")
    ours_bits, ours_inputs = MultiScaleBSQ(dim, scales, patchify=patchify).encode(features)
    assert difference(ours_inputs, inputs) < TOLERANCE
    assert all(torch.equal(x, y.long()) for x, y in zip(ours_bits, bits, strict=True))


@needs_official
@pytest.mark.parametrize(("bits", "levels"), [(16, 5), (14, 4)], ids=["f16", "f8"])
def test_live_vae(bits: int, levels: int) -> None:
    multipliers = (1, 2, 4, 4, 4)[:levels]
    theirs = official.autoencoder(bits, 32, multipliers)
    ours = InfinityVAE(VAEConfig(bits, 32, multipliers)).eval()
    assert set(ours.state_dict()) == {k for k in theirs.state_dict() if k.startswith(("encoder.", "decoder."))}
    state = {}
    for index, (name, tensor) in enumerate(sorted(ours.state_dict().items())):
        draw = case.normal(index, tensor.shape)
        state[name] = draw * 0.1 + 1 if "norm" in name and name.endswith("weight") else draw / tensor[0].numel() ** 0.5
    ours.load_state_dict(state)
    nn.Module.load_state_dict(theirs, state, strict=False)
    images, features = case.normal(1, (1, 3, 32, 64)).clamp(-1, 1), case.normal(2, (1, bits, 2, 4))
    with torch.no_grad():
        assert difference(ours.encode(images), theirs.encode_for_raw_features(images, None)[0]) < TOLERANCE
        assert difference(ours.decode(features), theirs.decode(features)) < TOLERANCE
