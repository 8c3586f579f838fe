"""Cost of steering a language model: SmolLM2-135M with its real weights, every norm of every layer steered.

    python -m bench.language --rounds 9

Contenders take turns on the same weights, one thread, and process time is taken, so that other programs on the machine
count little. `hooks` is the field's usual way, written from the formulas: a forward hook per site that compares with
the support, blends, gates and casts. A contender whose output does not differ from the unsteered one gets no time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

import pysteer
from bench.record import append, machine
from pysteer.families.base import find_family
from pysteer.models.language import LanguageModel, smollm2
from pysteer.steering import Plan, SiteParameters

PATTERN = "layernorm"
NAMES = ("unsteered", "unsteered again", "steered", "hooks")


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


def check(how: str, logits: Tensor, unsteered: Tensor) -> str:
    """An empty string, or why this contender may not be timed."""
    changed = not torch.equal(logits, unsteered)
    return "" if changed == (how in ("steered", "hooks")) else "the output did not change as it should"


def rows_of(label: str, mode: str, tokens: int, seconds: dict[str, list[float]], refused: dict[str, str]) -> list[Any]:
    """What is stored of one piece of work: medians over the rounds of the ratio within a round."""
    rows = []
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(mine[1:], seconds["unsteered"][1:], strict=True)]
        fine = not refused[name]
        rows.append(
            {
                "work": label,
                "mode": mode,
                "contender": name,
                "refused": refused[name],
                "tokens_per_second": tokens / statistics.median(mine[1:]) if fine else None,
                "ratio": statistics.median(ratios) if fine else None,
                "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if fine else None,
            }
        )
    return rows


def agree(outputs: dict[str, Tensor]) -> None:
    """Raise unless the steered model and the hooks do the same to the logits."""
    close = (outputs["steered"] - outputs["hooks"]).abs().max() / outputs["hooks"].abs().max()
    assert close < 1e-3, f"the steered model and the hooks disagree by {close:.1e}"


def run_eager(rounds: int) -> list[dict[str, Any]]:
    """Time all contenders on one model, round after round."""
    lm = smollm2()
    rows = []
    for label, batch, decode, prompt in (
        ("read 128 tokens", 1, 0, 128),
        ("generate, batch 1", 1, 12, 4),
        ("generate, batch 8", 8, 8, 4),
    ):
        call, tokens = work(lm, batch, decode, prompt)
        warm, _ = work(lm, batch, min(decode, 2), prompt)
        logits, _ = work(lm, 1, 0, 16)
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        outputs = {}
        for number in range(rounds + 1):
            for name in NAMES if number % 2 else NAMES[::-1]:
                with steered(lm, name.split()[0]):
                    outputs[name] = logits()
                    warm()  # the first call of every shape looks at all arguments
                    start = time.process_time()
                    call()
                    seconds[name].append(time.process_time() - start)
        agree(outputs)
        refused = {name: check(name.split()[0], outputs[name], outputs["unsteered"]) for name in NAMES}
        rows += rows_of(label, "eager", tokens, seconds, refused)
    return rows


class Compiled:
    """A copy of the model on the same weights, steered or not, compiled as one graph for one piece of work.

    Reading is one call without a cache. Decoding is one token after another into a static cache, as a server does it.
    """

    def __init__(self, lm: LanguageModel, how: str, batch: int, decode: int, prompt: int) -> None:
        shared = {id(p): p for p in lm.model.parameters()}
        self.lm = LanguageModel(copy.deepcopy(lm.model, shared), lm.tokenizer)
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(steered(self.lm, how))
        self.call = torch.compile(self.lm.model, fullgraph=True, dynamic=False)
        self.batch, self.decode, self.prompt = batch, decode, prompt
        self.ids = torch.randint(1000, 2000, (batch, prompt), generator=torch.Generator().manual_seed(1))
        self.seconds: list[float] = []

    def run(self) -> Tensor:
        """Do the work once, timed without what comes before it; the logits of the last call."""
        if not self.decode:
            start = time.process_time()
            out = self.call(input_ids=self.ids, use_cache=False).logits
            self.seconds.append(time.process_time() - start)
            return out
        cache = StaticCache(config=self.lm.model.config, max_cache_len=self.prompt + self.decode + 1)
        token = self.lm.model(input_ids=self.ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        start = time.process_time()
        for _ in range(self.decode):
            out = self.call(input_ids=token, past_key_values=cache).logits
            token = out[:, -1:].argmax(-1)
        self.seconds.append(time.process_time() - start)
        return out


def run_compiled(rounds: int) -> list[dict[str, Any]]:
    """Time compiled copies of the model, round after round."""
    lm, rows = smollm2(), []
    for label, batch, decode, prompt in (("read 128 tokens", 1, 0, 128), ("decode, batch 8", 8, 16, 16)):
        torch.compiler.reset()
        # Otherwise the graph of the unsteered copy serves the copy with hooks too, and they silently do nothing.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        contenders = {name: Compiled(lm, name.split()[0], batch, decode, prompt) for name in NAMES}
        outputs: dict[str, Tensor] = {}
        for name, contender in contenders.items():  # compiles
            outputs[name] = contender.run()
            print(f"{label}, {name}: compiled", flush=True)
        with torch.compiler.set_stance("fail_on_recompile"):
            for number in range(rounds + 1):
                for name in NAMES if number % 2 else NAMES[::-1]:
                    contenders[name].run()
        refused = {name: check(name.split()[0], outputs[name], outputs["unsteered"]) for name in NAMES}
        if not any(refused.values()):
            agree(outputs)
        seconds = {name: contender.seconds[1:] for name, contender in contenders.items()}
        rows += rows_of(label, "compiled", batch * (decode or prompt), seconds, refused)
        for contender in contenders.values():
            contender.stack.close()
    return rows


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mode", choices=("eager", "compiled", "both"), default="both")
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = run_eager(asked.rounds) if asked.mode != "compiled" else []
        rows += run_compiled(asked.rounds) if asked.mode != "eager" else []
    for row in rows:
        figures = row["refused"] or f"{row['ratio']:.3f} {[round(q, 3) for q in row['ratio_quartiles']]}"
        print(f"{row['mode']:8} {row['work']:20} {row['contender']:16} {figures}")
    if not asked.dry_run:
        append("language", {"rounds": asked.rounds, "rows": rows, **machine()})


if __name__ == "__main__":
    main()
