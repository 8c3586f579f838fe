"""Report page of the recipe `weightspace`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pysteer.files import write_bytes
from pysteer.metrics import Rate
from pysteer.recipes.config import config_values
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.page import interval, percent, versions
from pysteer.recipes.weights.bridge import Bridge
from pysteer.recipes.weights.config import WeightspaceConfig
from pysteer.recipes.weights.experiment import LayerOutcome
from pysteer.recipes.weights.figures import draw_bars, draw_map, positions
from pysteer.recipes.weights.steering import Edited
from pysteer.report import (
    Details,
    DoseCurve,
    DosePoint,
    Facts,
    Figure,
    Paragraph,
    Report,
    Row,
    Section,
    Table,
    dose_response,
    labelled_rows,
    png,
    render,
)
from pysteer.report.heatmap import heatmap
from pysteer.report.report import Block
from pysteer.weightspace.classify import Outcome
from pysteer.weightspace.families import FAMILIES
from pysteer.weightspace.loraset import LoraSet


@dataclass(frozen=True)
class Found:
    """Everything that was measured.

    Attributes:
        adapters: the collection.
        outcomes: of all families and models, and the control with shuffled labels.
        best: the one with the highest accuracy.
        layers: what each layer knows, best first.
        shared: outcomes on the collection with shared initial factors.
        edits: directions and what they do to pictures.
        bridges: the same directions in weights and in activations.
        seconds: time per family.
    """

    adapters: LoraSet
    outcomes: Sequence[Outcome]
    best: Outcome
    layers: Sequence[LayerOutcome]
    shared: Sequence[Outcome]
    edits: Sequence[Edited]
    bridges: Sequence[Bridge]
    seconds: dict[str, float]


def write_report(run: Run, config: WeightspaceConfig, found: Found) -> None:
    """Write figures and `report.html`."""
    best, control = found.best, next(each for each in found.outcomes if each.shuffled)
    chance = 1 / len(best.classes)
    facts = Facts([
        ("best test accuracy", percent(best.accuracy.value), f"{best.family}, {best.model}; {_ends(best.accuracy)}"),
        ("with shuffled labels", percent(control.accuracy.value),
         f"chance {percent(chance)}; {_ends(control.accuracy)}"),
        ("adapters", str(len(found.adapters)), f"{len(best.classes)} classes, d = {found.adapters.layout.width:,}"),
        ("files left out", str(len(found.adapters.skipped)), "named below" if found.adapters.skipped else "none"),
    ])  # fmt: skip
    sections = [Section("summary", "Summary", [facts]), _accuracy(found), _confusion(run, found)]
    sections.append(_map(run, config, found))
    sections += [_layers(run, found, chance)] if found.layers else []
    sections += [_edits(run, found)] if found.edits else []
    sections.append(_how(config, found))
    lead = (
        f"The classes of {len(found.adapters)} LoRA adapters are read from their weights at "
        f"{percent(best.accuracy.value)} ({best.family}, {best.model}), where chance is {percent(chance)}; no image is "
        "shared between training and test."
    )
    footer = f"pysteer run {run.recipe}; configuration {run.hash}; all numbers are in metrics.parquet and summary.json."
    run.write_text("report.html", render(Report("What LoRA adapters know of their images", lead, sections, footer)))


def _ends(rate: Rate) -> str:
    return f"[{percent(rate.low)}, {percent(rate.high)}]"


def _both(run: Run, name: str, draw: Callable[[Any], bytes], alt: str, caption: str) -> Figure:
    figure = Figure(draw("light"), alt, caption, draw("dark"))
    write_bytes(run.path(f"figures/{name}.png"), figure.light)
    return figure


def _table(outcomes: Sequence[Outcome], caption: str) -> Table:
    rows: list[list[str]] = []
    strong: list[int] = []
    best = max((o.accuracy.value for o in outcomes if not o.shuffled), default=0.0)
    for each in sorted(outcomes, key=lambda o: -o.accuracy.value):
        if each.accuracy.value == best and not each.shuffled:
            strong.append(len(rows))
        name = f"{each.family}{' (labels shuffled)' if each.shuffled else ''}"
        figures = each.as_dict()
        spread = "" if figures["std"] is None else f"{100 * figures['std']:.1f}"
        rows.append([name, each.model, f"{each.size:,}", interval(each.accuracy), spread, percent(figures["f1"]),
                     f"{figures['auc']:.3f}"])  # fmt: skip
    columns = ["features", "model", "how many", "test accuracy, %", "sd over runs", "macro F1", "AUC"]
    return Table(caption, columns, rows, strong)


def _accuracy(found: Found) -> Section:
    runs = len(found.best.accuracies)
    caption = (
        f"Test accuracy, mean over {runs} runs, each with a split and initial weights of its own, best first. "
        "Brackets: the wider of two 95 % intervals, Student's t over runs and Wilson's for the test part of one run. "
        "AUC: one class against the rest, mean over classes."
    )
    blocks: list[Block] = [_table(found.outcomes, caption)]
    if found.shared:
        text = (
            "Adapters that all start from the same factors, with the same models. Where every adapter starts from "
            "noise of its own, most of a flat vector is that noise."
        )
        blocks += [Paragraph(text), _table(found.shared, "The collection with shared initial factors.")]
    return Section("accuracy", "Accuracy by feature family", blocks)


def _confusion(run: Run, found: Found) -> Section:
    best = found.best
    share = best.confusion / best.confusion.sum(1, keepdims=True).clip(1)
    names = list(best.classes)

    def draw(theme: Any) -> bytes:
        return heatmap(share.tolist(), names, names, x="said", title="share of each class, %", theme=theme)

    worst = min(range(len(names)), key=lambda i: share[i, i])
    alt = f"Confusion of the best model; {names[worst]} is told worst, {percent(share[worst, worst])} right"
    return Section("confusion", "Confusion", [_both(run, "confusion", draw, alt, f"{best.family}, {best.model}.")])


def _map(run: Run, config: WeightspaceConfig, found: Found) -> Section:
    points = positions(found.adapters, config.map, config.seed)
    kinds = {"pca": "Principal coordinates", "tsne": "t-SNE", "umap": "UMAP"}
    title = f"{kinds[config.map]} of what the layers write"
    labels = found.adapters.labels
    alt = f"{title}: {len(points)} adapters, coloured by class"
    caption = "No label was used to place the points."
    figure = _both(run, "map", lambda theme: draw_map(points, labels, title, theme), alt, caption)
    return Section("map", "Map of all adapters", [figure])


def _layers(run: Run, found: Found, chance: float) -> Section:
    shown = found.layers[:32]
    names = [each.layer.removeprefix("unet.").replace("transformer_blocks.0.", "") for each in shown]
    rates = [each.alone.accuracy for each in shown]

    def draw(theme: Any) -> bytes:
        ends = [(r.low, r.high) for r in rates]
        return draw_bars(names, [r.value for r in rates], ends, "accuracy of one layer alone", theme, chance)

    figure = _both(run, "layers", draw, f"Accuracy by layer; best {names[0]}, {percent(rates[0].value)}",
                   "Ridge on what each layer writes; the dashed line is chance.")  # fmt: skip
    rows = [[name, interval(each.alone.accuracy), interval(each.without.accuracy)]
            for name, each in zip(names, shown, strict=True) if each.without is not None]  # fmt: skip
    table = Table("The best layers, and all others without them and the better ones.",
                  ["layer", "alone, %", "the rest without, %"], rows)  # fmt: skip
    return Section("layers", "Which layers know", [figure, table])


def _edits(run: Run, found: Found) -> Section:
    blocks: list[Block] = []
    pairs = list(dict.fromkeys(each.pair for each in found.edits))
    for number, pair in enumerate(pairs):
        own = [each for each in found.edits if each.pair == pair]
        target = pair.partition("->")[2]

        def draw(theme: Any, own: Sequence[Edited] = own, target: str = target) -> bytes:
            curves = [
                DoseCurve(e.kind, [DosePoint(d.t, d.target, d.source, 1 - d.none.value) for d in e.doses]) for e in own
            ]
            kept, known = f"shows {e_source(own)}", "any known\nclass"
            return dose_response(
                curves, target_name=f"shows {target}", kept_name=kept, distance_name=known, theme=theme
            )

        alt = f"Rates of {target} against how far adapters are moved, {pair}"
        caption = "Wilson 95 % intervals. Lower panels: share of pictures that show any known class."
        blocks.append(_both(run, f"edit-{number}", draw, alt, caption))
        rows = [[e.kind, f"{d.t:g}", interval(d.target), interval(d.source), percent(d.none.value)]
                for e in own for d in e.doses]  # fmt: skip
        total = own[0].doses[0].target.total
        table = Table(f"{pair}: {total} pictures per row.",
                      ["direction", "t", "shows the target, %", "shows the source, %", "none"], rows)  # fmt: skip
        sheet = png(labelled_rows([Row(f"t = {d.t:g}", d.images[:12], own[0].kind) for d in own[0].doses], tile=64))
        write_bytes(run.path(f"images/edit-{number}.png"), sheet)
        blocks.append(Figure(sheet, f"Pictures of edited adapters, {pair}", f"{pair}, {own[0].kind}; not selected."))
        blocks.append(Details(f"Rates, {pair}", [table]))
    text = (
        "Adapters of the source class are moved along a direction in the space of changes and cut to a low rank again; "
        "at t = 1 they are moved by the difference of the class means. The random direction is as long as that "
        "difference."
    )
    blocks += _bridges(found)
    return Section("edits", "Steering in weight space", [Paragraph(text), *blocks])


def _bridges(found: Found) -> list[Block]:
    """Weights and activations side by side."""
    blocks: list[Block] = []
    for each in found.bridges:
        rows = [[what, f"{strength:g}", interval(r)] for what, strength, r in each.rates]
        total = each.rates[0][2].total
        caption = (
            f"{each.pair} on the generator itself, {total} pictures per row of the empty prompt: the direction as a "
            "change of weights, as the mean shift dW h that it predicts at every layer and step, and the shift fitted "
            "on activations of captions that differ in the class word, at the same layers."
        )
        blocks.append(Table(caption, ["what is changed", "strength", "shows the target, %"], rows))
        best = sorted(each.cosines.items(), key=lambda item: -abs(item[1]))[:8]
        cosines = [[layer.removeprefix("unet."), f"{value:+.3f}"] for layer, value in best]
        mean = sum(each.cosines.values()) / len(each.cosines)
        table = Table(f"Cosine between predicted and fitted shift, mean over steps; over all layers {mean:+.3f}.",
                      ["layer", "cosine"], cosines)  # fmt: skip
        blocks.append(Details(f"Cosines by layer, {each.pair}", [table]))
    return blocks


def e_source(own: Sequence[Edited]) -> str:
    """The source class of a pair."""
    return own[0].pair.partition("->")[0]


def _how(config: WeightspaceConfig, found: Found) -> Section:
    notes = {line.partition("  ")[0].strip(): line.partition("  ")[2].strip() for line in _family_lines()}
    families = [[name, notes.get(name, "the first principal components of the flat vector"),
                 f"{found.seconds[name]:.1f}"] for name in found.seconds]  # fmt: skip
    values = [[key, "" if value is None else str(value)] for key, value in config_values(config).items()]
    blocks: list[Block] = [
        Paragraph(f"{versions()}. Adapters that share an image are in the same part of every split. Ridge and logistic "
                  "regression choose their strength on the validation part, perceptrons keep the weights of their best "
                  "epoch there; the test part is looked at once."),
        Table("Feature families.", ["family", "what it is", "seconds"], families, numeric=False),
    ]  # fmt: skip
    if found.adapters.skipped:
        rows = [[skip.path, skip.reason] for skip in found.adapters.skipped[:200]]
        table = Table(f"{len(found.adapters.skipped)} files.", ["file", "reason"], rows, numeric=False)
        blocks.append(Details("Files that were left out", [table]))
    settings = Table("The configuration.", ["key", "value"], values, numeric=False)
    blocks.append(Details("Configuration", [settings]))
    return Section("how", "How this was made", blocks)


def _family_lines() -> list[str]:
    from pysteer.weightspace import families

    lines = [line.strip() for line in (families.__doc__ or "").splitlines()]
    return [line for line in lines if line.partition(" ")[0].rstrip(",") in FAMILIES]
