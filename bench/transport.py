"""Transporting activations: a sweep of strengths against the usual loop, the cost of incremental fits, memory of fits.

    python -m bench.transport sweep --prompts 4
    python -m bench.transport fits
    python -m bench.transport memory
    python -m bench.transport concepts results/act-text-*     # keeps the figures of runs of act-text
    python -m bench.transport concepts --add FOLDERS          # beside those that are stored
    python -m bench.transport methods results/six-music       # keeps a comparison of methods, the newest of a concept
    python -m bench.transport table                           # prints what is stored and puts it into docs/act.md

SmolLM2-135M with its real weights, one thread. The loop does what the published pipeline does: for every strength it
reads the maps, makes new hooks, registers them at every layer norm, generates prompt after prompt, and removes them.
Contenders take turns, strength by strength; process time is given beside wall time, because other programs on the
machine make the latter uncertain.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.language import usual_hook
from bench.record import RESULTS, append, machine, stored
from bench.serving import held
from pysteer import files
from pysteer.capture.fitted import Fitted
from pysteer.data.concepts import concept_sentences, openings
from pysteer.data.tasks import Task
from pysteer.errors import InputError
from pysteer.methods import GaussianTransport, LinearAcT, MeanDifference
from pysteer.models.language import LanguageModel, smollm2
from pysteer.recipes.transport.decoder import Request, RowDecoder, in_order
from pysteer.recipes.transport.sampling import Sampling
from pysteer.recipes.transport.text_trial import fit_texts
from pysteer.steering import SiteParameters

STRENGTHS = [round(0.1 * i, 1) for i in range(11)]
GREEDY = Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0)


def loaded(name: str, dtype: torch.dtype) -> LanguageModel:
    """SmolLM2, or a folder that holds it."""
    lm = smollm2() if name == "smollm2" else LanguageModel.from_pretrained(name)
    return lm.to(dtype)


def task_of(count: int | None = None) -> Task:
    """The sentences about football, repeated to `count` where more are wanted."""
    source, target = concept_sentences("football")
    if count is None:
        return Task("football", source, target)
    return Task(
        "football", [source[i % len(source)] for i in range(count)], [target[i % len(target)] for i in range(count)]
    )


def looped(lm: LanguageModel, folder: Path, strength: float, prompts: list[str], tokens: int, batch: int) -> list[str]:
    """One strength of the usual loop: read the maps, new hooks, generate in batches of `batch`, remove the hooks."""
    handles = [
        lm.model.get_submodule(entry.site).register_forward_hook(blended_hook(entry, strength))
        for entry in Fitted.from_pretrained(folder).parameters
    ]
    try:
        texts: list[str] = []
        for start in range(0, len(prompts), batch):
            # As many tokens for every prompt: no token ends a text, and none is forbidden, unlike with min_new_tokens.
            texts += lm.generate(prompts[start : start + batch], max_new_tokens=tokens, eos_token_id=-1)
        return texts
    finally:
        for handle in handles:
            handle.remove()


def blended_hook(entry: SiteParameters, strength: float) -> Callable[..., Any]:
    """The published blend with the strength of this hook; the first token of a text is left alone, as by pysteer."""
    scaled = SiteParameters(entry.site, entry.op, None, dict(entry.tensors), dict(entry.options))
    gain = scaled.tensors["gain"]
    scaled.tensors["gain"] = 1 + strength * (gain - 1)
    scaled.tensors["bias"] = strength * scaled.tensors["bias"]
    inner = usual_hook(scaled)

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        moved = inner(module, args, output)
        if output.shape[1] > 1:
            moved = torch.cat((output[:, :1], moved[:, 1:]), dim=1)
        return moved

    return hook


def sweep(
    lm: LanguageModel, prompts: int, tokens: int, rows: int, batch: int, looped_strengths: list[float]
) -> dict[str, Any]:
    """11 strengths: all rows of one batch, against the loop; the same texts where arithmetic allows it.

    Every strength costs the loop the same, so it may be timed at some of them and counted eleven times.
    """
    asked = [opening for use in ("report", "search") for opening in openings(use)]
    # The loop pads prompts of a batch on the left, where its hooks reach; alone they have no padding.
    chosen = [asked[i % len(asked)] for i in range(prompts)]
    ids = [tuple(one) for one in lm.token_ids(chosen)]
    sites = [f"model.layers.{i}.{kind}_layernorm" for i in range(lm.model.config.num_hidden_layers)
             for kind in ("input", "post_attention")]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "maps"
        fit_texts(lm, LinearAcT(), task_of(), sites).save_pretrained(folder)
        plan = Fitted.from_pretrained(folder).plan()
        decoder = RowDecoder(lm, rows=rows, max_new_tokens=tokens, sampling=GREEDY, stop_at_end=False)
        requests = [Request(one, strength) for one in ids for strength in STRENGTHS]
        cpu, wall = time.process_time(), time.perf_counter()
        made = in_order(decoder, requests, plan)
        ours = (time.process_time() - cpu, time.perf_counter() - wall)
        loops: list[tuple[float, float]] = []
        texts: dict[float, list[str]] = {}
        for strength in looped_strengths:
            cpu, wall = time.process_time(), time.perf_counter()
            texts[strength] = looped(lm, folder, strength, chosen, tokens, batch)
            loops.append((time.process_time() - cpu, time.perf_counter() - wall))
    own = {
        (request.strength, i // len(STRENGTHS)): one
        for i, (request, one) in enumerate(zip(requests, made, strict=True))
    }
    decoded = {key: lm.tokenizer.decode(list(one.tokens), skip_special_tokens=True) for key, one in own.items()}
    same = [decoded[strength, i] == texts[strength][i] for strength in looped_strengths for i in range(prompts)]
    loop = [sum(column) * len(STRENGTHS) / len(loops) for column in zip(*loops, strict=True)]
    return {
        "prompts": prompts, "strengths": len(STRENGTHS), "tokens": tokens, "rows": rows, "loop_batch": batch,
        "loop_strengths": len(loops),
        "dtype": str(next(lm.model.parameters()).dtype),
        "ours_cpu": ours[0], "ours_wall": ours[1], "loop_cpu": loop[0], "loop_wall": loop[1],
        "speedup_cpu": loop[0] / ours[0], "speedup_wall": loop[1] / ours[1],
        "same_text": statistics.mean(same),
        "same_text_at_0": statistics.mean(decoded[0.0, i] == texts[0.0][i] for i in range(prompts)),
        "changed": statistics.mean(decoded[1.0, i] != decoded[0.0, i] for i in range(prompts)),
    }  # fmt: skip


def fits(lm: LanguageModel, sites: int, rounds: int) -> dict[str, Any]:
    """Process time of an incremental fit over that of a fit at once, with the same texts and sites."""
    names = [f"block.{i}" for i in range(lm.model.config.num_hidden_layers)]
    names += [f"mlp.{i}" for i in range(lm.model.config.num_hidden_layers)]
    task, ratios, seconds = task_of(), [], []
    for _ in range(rounds + 1):  # the first one warms up
        spent = []
        for sequential in (False, True):
            start = time.process_time()
            fit_texts(lm, LinearAcT(), task, names[:sites], sequential=sequential, batch_size=32)
            spent.append(time.process_time() - start)
        ratios.append(spent[1] / spent[0])
        seconds.append(spent)
    return {
        "sites": sites, "texts": len(task.source) + len(task.target), "ratio": statistics.median(ratios[1:]),
        "at_once": statistics.median(s[0] for s in seconds[1:]),
        "incremental": statistics.median(s[1] for s in seconds[1:]),
    }  # fmt: skip


def grown(call: Callable[[], Any]) -> int:
    """Bytes that a call holds at its peak beyond what is held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = held("VmRSS")
    result = call()
    after = held("VmHWM")
    del result
    return max(0, after - before)


def memory(lm: LanguageModel, texts: int, sites: int) -> list[dict[str, Any]]:
    """Peak memory of fits from so many texts per class at so many sites, beyond a run over one batch of them."""
    names = [f"{kind}.{i}" for kind in ("block", "mlp") for i in range(lm.model.config.num_hidden_layers)][:sites]
    task = task_of(texts)
    small = task_of(32)
    rows = []
    for method in (MeanDifference(), GaussianTransport(), LinearAcT()):
        one = grown(lambda m=method: fit_texts(lm, m, small, names, batch_size=32))  # type: ignore[misc]
        one = min(one, grown(lambda m=method: fit_texts(lm, m, small, names, batch_size=32)))  # type: ignore[misc]
        whole = grown(lambda m=method: fit_texts(lm, m, task, names, batch_size=32))  # type: ignore[misc]
        width = lm.model.config.hidden_size
        promised = 4 * 2 * texts * width * sites if isinstance(method, LinearAcT) else 2 * 64 * width * sites
        rows.append(
            {
                "method": method.name,
                "texts": 2 * texts,
                "sites": sites,
                "one_batch": one,
                "peak": whole,
                "promised": promised,
            }
        )
    return rows


def concepts(folders: list[str]) -> list[dict[str, Any]]:
    """The results of `act-text` runs: what was reached per concept, and how each method did in the search."""
    rows = []
    for folder in map(Path, folders):
        summary = files.read_json(folder / "summary.json", "summary of a run")
        config = files.read_json(folder / "run.json", "marker of the run folder")["config"]
        rows.append(
            {
                "task": config["task"]["name"],
                "best": summary["best"],
                "headline": summary["headline"],
                "methods": summary["tables"]["methods"],
                "search": len(summary["tables"]["search"]),
                "config": {name: config[name] for name in ("method", "generation", "search", "seed")},
                "seconds": summary["seconds"],
            }
        )
    return rows


def methods(folders: list[str]) -> list[dict[str, Any]]:
    """What each method of a run that compares some reaches at each strength."""
    if len(folders) != 1:
        raise InputError("run folders", value=folders, allowed="one, of act-text with several methods")
    return concepts(folders)


def _method_lines(row: dict[str, Any], processor: str) -> list[str]:
    """One line a method and strength: rate and perplexity."""
    lines = [
        f"| {row['task']}: method | place | strength | texts about it, % | perplexity, x unsteered |",
        "|---|---|---|---|---|",
    ]
    for found in row["methods"]:
        name = found["method"].replace("_", " ") + ("" if found["readable"] else " (not readable)")
        lines.append(
            f"| {name} | {found['place']} | {found['strength']:g} | {_rate(found['concept_rate'])} | {_ratio(found)} |"
        )
    before = row["headline"]["unsteered"]["concept_rate"]
    lines += [
        "",
        f"{before['n']} texts per strength, unsteered {_rate(before)} %; 95 % intervals. Not readable: perplexity "
        f"above the bar of the run, 1.5 times that of unsteered texts where nothing else is asked for. {processor}.",
    ]
    return lines


def beside_stored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the newest stored result, each with where and when it was measured, and `rows` behind them."""
    kept: list[dict[str, Any]] = []
    for entry in stored("transport"):
        if entry["what"] == "concepts":
            where = {"processor": entry["machine"]["processor"], "date": entry["date"]}
            kept = [{**where, **row} for row in entry["result"]]  # a row that was kept before says itself where
    return [*kept, *rows]


def _rate(found: dict[str, float]) -> str:
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _ratio(found: dict[str, float]) -> str:
    low, high = found["perplexity_ratio_low"], found["perplexity_ratio_high"]
    return f"{found['perplexity_ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _concept_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| concept | unsteered, % | steered, % | perplexity, x unsteered | tokens | setting | settings searched |",
        "|---|---|---|---|---|---|---|",
    ]
    order = list(dict.fromkeys(row["task"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["task"])):
        best, before = row["headline"]["best"], row["headline"]["unsteered"]
        setting = f"{best['method'].replace('_', ' ')}, {best['place']}, strength {best['strength']:g}"
        if steered_new := row["config"]["method"]["steered_new"]:
            setting += f", first {steered_new} tokens"
        rates = f"{_rate(before['concept_rate'])} | {_rate(best['concept_rate'])} | {_ratio(best)}"
        tokens = row["config"]["generation"]["new_seq_len"]
        lines.append(f"| {row['task']} | {rates} | {tokens} | {setting} | {row['search']} |")
    count = rows[0]["headline"]["best"]["concept_rate"]["n"]
    rule = "the best setting of a search on other prompts; the unsteered texts are of the same length"
    lines += ["", f"{count} texts each, {rule}; 95 % intervals."]
    return lines


def _places(entry: dict[str, Any]) -> str:
    """Which rows of a stored result were measured elsewhere than most of them."""
    own = entry["machine"]["processor"]
    processors = [row.get("processor", own) for row in entry["result"]]
    most = statistics.mode(processors)
    found: dict[str, list[str]] = {}
    for row, processor in zip(entry["result"], processors, strict=True):
        if processor != most:
            tokens = row["config"]["generation"]["new_seq_len"]
            found.setdefault(processor, []).append(f"{row['task']} with {tokens} tokens")
    parts = [f"{', '.join(rows)} on {name}" for name, rows in found.items()]
    return f"Measured elsewhere than the rest: {'; '.join(parts)}." if parts else ""


def _sweep_line(entry: dict[str, Any]) -> str:
    """What a sweep in one batch is over the loop, and how many texts are the same."""
    r = entry["result"]
    dtype = r["dtype"].removeprefix("torch.")
    loop = "prompt after prompt" if r["loop_batch"] == 1 else f"{r['loop_batch']} prompts at a time"
    return (
        f"- {r['strengths']} strengths x {r['prompts']} prompts x {r['tokens']} tokens: {r['speedup_cpu']:.1f} x a "
        f"loop that rebuilds 60 hooks per strength, {loop} (process time, 1 thread, {dtype}, "
        f"{entry['machine']['processor']}; {100 * r['same_text']:.0f} % of texts are equal to the loop's, "
        f"{100 * r['same_text_at_0']:.0f} % at strength 0)."
    )


def table() -> str:
    """The newest stored result of each kind as Markdown."""
    newest = {entry["what"]: entry for entry in stored("transport")}
    lines: list[str] = []
    if "concepts" in newest:
        lines += [*_concept_lines(newest["concepts"]["result"]), _places(newest["concepts"]), ""]
    compared = {entry["result"][0]["task"]: entry for entry in stored("transport") if entry["what"] == "methods"}
    for entry in compared.values():
        lines += [*_method_lines(entry["result"][0], entry["machine"]["processor"]), ""]
    sweeps = {(e["result"]["dtype"], e["result"]["loop_batch"]): e for e in stored("transport") if e["what"] == "sweep"}
    lines += [_sweep_line(entry) for entry in sweeps.values()]
    if "fits" in newest:
        r = newest["fits"]["result"]
        lines.append(
            f"- Incremental fit of {r['sites']} sites from {r['texts']} texts: {r['ratio']:.2f} x the fit at once "
            f"({r['incremental']:.1f} and {r['at_once']:.1f} s of process time)."
        )
    if "memory" in newest:
        lines += [
            f"- `{r['method']}`, {r['texts']} texts at {r['sites']} sites: {(r['peak'] - r['one_batch']) / 1e6:.0f} MB "
            f"beyond a batch ({r['promised'] / 1e6:.0f} MB by the formula)."
            for r in newest["memory"]["result"]
        ]
    where = next(iter(newest.values()), None)
    if where is not None:
        lines += [
            "",
            f"Measured on {where['machine']['processor']}, torch {where['versions']['torch']}, {where['date'][:10]}.",
        ]
    return "\n".join(lines)


def write_table(path: Path) -> None:
    """Put the table between the marks of a page."""
    begin, end = "<!-- transport: python -m bench.transport table -->\n", "<!-- /transport -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    files.write_text(path, f"{before}{begin}{table()}\n{end}{after}")


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "fits", "memory", "concepts", "methods", "table"))
    parser.add_argument("folders", nargs="*", help="run folders of act-text, for `concepts` and `methods`")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder that holds it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time in the loop")
    parser.add_argument(
        "--loop-strengths", type=int, default=11, help="strengths the loop is timed at, 0 and 1 among them"
    )
    parser.add_argument("--sites", type=int, default=60)
    parser.add_argument("--texts", type=int, default=500, help="per class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="keep the stored rows of `concepts` beside the new ones")
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    asked = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if asked.what == "table":
        print(table())
        write_table(RESULTS.parent.parent / "docs" / "act.md")
        return
    if asked.what == "concepts":
        rows = concepts(asked.folders)
        found: Any = beside_stored(rows) if asked.add else rows
    elif asked.what == "methods":
        found = methods(asked.folders)
    else:
        lm = loaded(asked.model, getattr(torch, asked.dtype))
        if asked.what == "sweep":
            count = max(2, min(asked.loop_strengths, len(STRENGTHS)))
            chosen = [STRENGTHS[round(i * (len(STRENGTHS) - 1) / (count - 1))] for i in range(count)]
            found = sweep(lm, asked.prompts, asked.tokens, asked.rows, asked.batch, chosen)
        elif asked.what == "fits":
            found = fits(lm, asked.sites, asked.rounds)
        else:
            found = memory(lm, asked.texts, asked.sites)
    print(found)
    if not asked.dry_run:
        append("transport", {"what": asked.what, "result": found, **machine()})


if __name__ == "__main__":
    main()
