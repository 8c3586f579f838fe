"""A plan steers a model object made by the published code exactly as it steers the port.

Needs the published code, see `official.py`; tests/families has the same with a stand-in for it.
"""

from __future__ import annotations

import contextlib

import official
import parity_case as case
import pytest
import torch
from test_parity import TOLERANCE, difference, packed

import pysteer
from pysteer.steering import Plan, SiteParameters

pytestmark = pytest.mark.skipif(official.official_path() is None, reason=f"needs {official.VARIABLE}")

STEPS = (1, 3)
SETTINGS = {
    "self-attention": ("sa.1", "both"),
    "cross-attention": ("ca.0", "cond"),
    "FFN": ("ffn.0", "cond"),
    "unconditional FFN": ("ffn.1", "uncond"),
    "block": ("ca_block.0", "cond"),
    "pooled text": ("pooled", "cond"),
}


def shift_plan(site: str, rows: str, width: int) -> Plan:
    """Random gains and biases at two scales (the pooled vector has one step)."""
    steps = (0,) if site == "pooled" else STEPS
    tensors = {
        "gain": 1 + 0.2 * case.normal(21, (len(steps), width)),
        "bias": 0.5 * case.normal(22, (len(steps), width)),
    }
    return Plan.build([SiteParameters(site, "affine_shift", steps, tensors)], rows=rows)


@pytest.mark.parametrize("cfg", [3.0, 1.0], ids=["guided", "cfg 1"])
@pytest.mark.parametrize("name", SETTINGS)
def test_same_effect(name: str, cfg: float) -> None:
    site, rows = SETTINGS[name]
    if cfg == 1.0 and rows == "uncond":
        pytest.skip("no unconditional rows")
    config = case.small_config()
    port = case.build(config, case.SEED)
    published = official.build(config, case.weights(config, case.SEED))
    text = case.texts(config, case.LENGTHS, case.SEED)
    forced = case.forced_bits(config, config.scales, len(case.LENGTHS), case.SEED)
    plan = shift_plan(site, rows, config.dim)

    def run_published(steered: bool) -> official.OfficialRun:
        with pysteer.steer(published, plan, strength=0.7) if steered else contextlib.nullcontext():
            return official.generate(
                published, config.scales, packed(text), cfg=[cfg] * 7, tau=[case.TAU] * 7, forced=forced
            )

    before = run_published(False)
    with pysteer.steer(port, plan, strength=0.7) as handle:
        ours = case.run_port(port, text, cfg=cfg, forced=forced)
    theirs, after = run_published(True), run_published(False)
    assert handle.report()[0].tokens_touched > 0
    for scale in range(7):
        moved = difference(theirs.blocks[scale][1], before.blocks[scale][1])
        if site == "pooled" or scale in STEPS:
            assert moved > 1e-3
        elif scale < STEPS[0]:
            assert moved == 0
        assert torch.equal(after.blocks[scale][1], before.blocks[scale][1])
        for x, y in zip(ours.blocks[scale], theirs.blocks[scale], strict=True):
            assert difference(x, y) < TOLERANCE
        assert difference(ours.logits[scale], theirs.logits[scale]) < TOLERANCE
