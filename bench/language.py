"""Cost of steering a language model: SmolLM2-135M with its real weights, every norm of every layer steered.

    python -m bench.language --rounds 9

Contenders take turns on the same weights, one thread, and process time is taken, so that other programs on the machine
count little. `hooks` is the field's usual way, written from the formulas: a forward hook per site that compares with
the support, blends, gates and casts. A contender whose output does not differ from the unsteered one gets no time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import pysteer
from bench.record import append, machine
from pysteer.families.base import find_family
from pysteer.models.language import LanguageModel, smollm2
from pysteer.steering import Plan, SiteParameters

PATTERN = "layernorm"


def parameters(lm: LanguageModel) -> list[SiteParameters]:
    """A small affine map with wide bounds at every norm."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, site in find_family(lm).sites(lm).items():
        if PATTERN in name:
            gain = 1 + 0.02 * torch.randn(1, site.width, generator=generator)
            bias = 0.01 * torch.randn(1, site.width, generator=generator)
            bounds = {"low": torch.full_like(bias, -1e6), "high": torch.full_like(bias, 1e6)}
            found.append(SiteParameters(name, "affine_shift", None, {"gain": gain, "bias": bias, **bounds}))
    return found


def usual_hook(entry: SiteParameters) -> Callable[..., Tensor]:
    """y = g (s T(z) + (1 - s) z) + (1 - g) z with g = 1[low < z < high], launch by launch."""
    bank = {name: tensor[0] for name, tensor in entry.tensors.items()}
    strength = 1.0

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        z = output.to(torch.float32)
        inside = ((z > bank["low"]) & (z < bank["high"])).to(z.dtype)
        moved = bank["gain"] * z + bank["bias"]
        blended = strength * moved + (1 - strength) * z
        return (inside * blended + (1 - inside) * z).to(output.dtype)

    return hook


@contextlib.contextmanager
def steered(lm: LanguageModel, how: str) -> Iterator[None]:
    """The model unsteered, steered by a plan, or by hooks."""
    entries = parameters(lm)
    if how == "steered":
        with pysteer.steer(lm, Plan.build(entries)):
            yield
        return
    handles = []
    if how == "hooks":
        handles = [lm.model.get_submodule(entry.site).register_forward_hook(usual_hook(entry)) for entry in entries]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def work(lm: LanguageModel, batch: int, decode: int, prompt: int) -> tuple[Callable[[], Tensor], int]:
    """A call that does the work once, and the tokens it handles: reading a prompt, or generating after a short one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 2000, (batch, prompt), generator=generator)
    mask = torch.ones_like(ids)

    def read() -> Tensor:
        return lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def generate() -> Tensor:
        settings = {"max_new_tokens": decode, "min_new_tokens": decode, "do_sample": False, "pad_token_id": 0}
        return lm.model.generate(input_ids=ids, attention_mask=mask, **settings)

    return (generate, batch * decode) if decode else (read, batch * prompt)


def run(rounds: int) -> list[dict[str, Any]]:
    """Time all contenders, round after round; ratios to the unsteered model within a round."""
    lm = smollm2()
    names, rows = ("unsteered", "unsteered again", "steered", "hooks"), []
    for label, batch, decode, prompt in (
        ("read 128 tokens", 1, 0, 128),
        ("generate, batch 1", 1, 12, 4),
        ("generate, batch 8", 8, 8, 4),
    ):
        call, tokens = work(lm, batch, decode, prompt)
        logits, _ = work(lm, 1, 0, 16)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        outputs = {}
        for number in range(rounds + 1):
            for name in names if number % 2 else names[::-1]:
                with steered(lm, name.split()[0]):
                    outputs[name] = logits()
                    start = time.process_time()
                    call()
                    seconds[name].append(time.process_time() - start)
        for name in names:
            ratios = [a / b for a, b in zip(seconds[name][1:], seconds["unsteered"][1:], strict=True)]
            changed = not torch.equal(outputs[name], outputs["unsteered"])
            refused = "" if changed == (name in ("steered", "hooks")) else "the output did not change"
            rows.append(
                {
                    "work": label,
                    "contender": name,
                    "refused": refused,
                    "tokens_per_second": None if refused else tokens / statistics.median(seconds[name][1:]),
                    "ratio": None if refused else statistics.median(ratios),
                    "ratio_quartiles": None if refused else statistics.quantiles(ratios, n=4)[::2],
                }
            )
        close = (outputs["steered"] - outputs["hooks"]).abs().max() / outputs["hooks"].abs().max()
        assert close < 1e-3, f"the steered model and the hooks disagree by {close:.1e}"
    return rows


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = run(asked.rounds)
    for row in rows:
        figures = row["refused"] or f"{row['ratio']:.3f} {[round(q, 3) for q in row['ratio_quartiles']]}"
        print(f"{row['work']:20} {row['contender']:16} {figures}")
    if not asked.dry_run:
        append("language", {"rounds": asked.rounds, "rows": rows, **machine()})


if __name__ == "__main__":
    main()
