"""Report pages of the recipes `sae` and `dream`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pysteer.dream.representation import Representation
from pysteer.dream.selectivity import Selectivity
from pysteer.files import write_bytes
from pysteer.models.sae import SparseAutoencoder
from pysteer.recipes.config import config_values
from pysteer.recipes.dreaming.figures import training_curves
from pysteer.recipes.dreaming.making import decode_png
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.page import percent, versions
from pysteer.report import (
    Details,
    Facts,
    Figure,
    Paragraph,
    Report,
    Row,
    Section,
    Table,
    labelled_rows,
    png,
    render,
)
from pysteer.report.figures import THEMES

_SHOWN = 24  # features in tables and sheets
_TILES = 5


def _configuration(config: Any) -> Details:
    values = [[key, "" if value is None else str(value)] for key, value in config_values(config).items()]
    return Details("Configuration", [Table("The configuration.", ["key", "value"], values, numeric=False)])


def _footer(run: Run) -> str:
    return f"pysteer run {run.recipe}; configuration {run.hash}; {versions()}."


def training_report(
    run: Run,
    sae: SparseAutoencoder,
    history: Sequence[Mapping[str, Any]],
    quality: Mapping[str, float],
    measured: Selectivity | None,
    config: Any,
) -> None:
    """Write `report.html` of a training."""
    curves, dark = (training_curves(history, theme) for theme in THEMES)
    write_bytes(run.path("figures/training.png"), curves)
    facts = [
        ("variance unexplained", percent(quality["fvu"]), f"on {quality['tokens']:.0f} fresh tokens"),
        ("latents per token", f"{quality['l0']:.2f}", f"of {sae.latents}"),
        ("never active", percent(quality["dead"]), "share of the latents"),
    ]
    blocks: list[Any] = []
    lead = f"{sae.latents} latents at {config.site} of {config.model} leave {percent(quality['fvu'])} unexplained."
    if measured is not None:
        share, live = measured.share(config.least), int(measured.live.sum())
        facts.append(("selective", percent(share), f"of {live} live latents tell a label, area above {config.least:g}"))
        lead += f" {percent(share)} of the live ones tell a shape or a colour."
        blocks = [_selectivity_table(measured, config.least)]
    sections = [
        Section(
            "summary",
            "Summary",
            [Facts(facts), Figure(curves, "Three curves of the training over its steps", "", dark)],
        ),
        *([Section("labels", "What latents tell", blocks)] if blocks else []),
        Section("how", "How this was made", [_configuration(config)]),
    ]
    run.write_text("report.html", render(Report("A sparse autoencoder", lead, sections, _footer(run))))


def _selectivity_table(measured: Selectivity, least: float) -> Table:
    best, which = measured.best()
    rows = []
    for number, name in enumerate(measured.names):
        own = [float(best[i]) for i in range(len(best)) if int(which[i]) == number and float(best[i]) > least]
        rows.append([name, str(len(own)), f"{float(measured.areas[:, number].nan_to_num(0.0).max()):.3f}"])
    caption = (
        f"Per label: latents that tell it best with an area under the ROC curve above {least:g}, and the largest area "
        "of all. The score of an image is the mean of a latent over its tokens and denoising steps."
    )
    return Table(caption, ["label", "latents", "largest area"], rows)


def dream_report(run: Run, config: Any, headline: Mapping[str, Any], folder: Any) -> None:
    """Write `report.html` of a dream run from its representation."""
    shown = Representation.open(folder)
    sections = [Section("summary", "Summary", [Facts(_facts(headline)), Paragraph(_HOW_JUDGED)])]
    sections += [_kind_section(run, shown, str(kind)) for kind in shown.about["kinds"]]
    sections.append(Section("how", "How this was made", [_configuration(config)]))
    lead = _lead(config, headline)
    title = f"Features of {shown.about['site']} in {shown.about['model']}"
    run.write_text("report.html", render(Report(title, lead, sections, _footer(run))))


_HOW_JUDGED = (
    "A feature stands for the label that it tells best, where the area under the ROC curve is above 0.9. Its priors "
    "and dreams are shown to the bundled classifier; chance is one over the number of classes of the attribute. The "
    "classifier has a class for none of them, which is never right. Brackets: 95 % Wilson intervals."
)


def _facts(headline: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for kind, about in headline.items():
        if not isinstance(about, dict) or "live" not in about:
            continue
        found.append((f"{kind}: active", str(about["live"]), f"of {about['count']} features"))
        if about.get("selective") is not None:
            found.append((f"{kind}: selective", percent(about["selective"]), "of the active ones tell a label"))
        for role in ("prior", "dream"):
            if about.get(role):
                note = f"chance {percent(about[role]['chance'])}; {about[role]['n']} images"
                found.append((f"{kind}: {role}s right", percent(about[role]["value"]), note))
    return found


def _lead(config: Any, headline: Mapping[str, Any]) -> str:
    parts = []
    for kind in ("sae", "raw"):
        about = headline.get(kind) or {}
        parts += [
            f"{role}s of selective {kind} features show their label in {percent(about[role]['value'])} of "
            f"{about[role]['n']} images (chance {percent(about[role]['chance'])})"
            for role in ("prior", "dream")
            if about.get(role)
        ]
    return ("; ".join(parts) + ".").capitalize() if parts else f"Features of {config.model}, stage by stage."


def _kind_section(run: Run, shown: Representation, kind: str) -> Section:
    features = [row for row in shown.features(kind) if row["cover"]]
    features.sort(key=lambda row: (-row["area"], -row["activity"]))
    features = features[:_SHOWN]
    rows = [
        [str(row["feature"]), row["label"], f"{row['area']:.3f}", f"{row['activity']:.3g}",
         ", ".join(map(str, row["peaks"]))] for row in features
    ]  # fmt: skip
    blocks: list[Any] = [
        Table("Features with pictures.", ["feature", "label it tells best", "area", "activity", "peaks"], rows)
    ]
    for role in ("prior", "dream", "example"):
        sheet = _sheet(shown, kind, features, role)
        if sheet is not None:
            write_bytes(run.path(f"figures/{kind}-{role}.png"), sheet)
            blocks.append(Figure(sheet, f"Images of {role}s of {kind} features, a row each", f"{role.capitalize()}s"))
    title = "Latents of the autoencoder" if kind == "sae" else "Channels as they are"
    return Section(kind, title, blocks)


def _sheet(shown: Representation, kind: str, features: Sequence[Mapping[str, Any]], role: str) -> bytes | None:
    rows = []
    for row in features:
        images = shown.images(kind, int(row["feature"]), role)
        if not images:
            continue
        chosen = images[:: max(1, len(images) // _TILES)][:_TILES]
        pixels = [decode_png(shown.path(each["image"]).read_bytes()) for each in chosen]
        rows.append(Row(f"{kind} {row['feature']}", torch.stack(pixels), str(row["label"])))
    return png(labelled_rows(rows, tile=72)) if rows else None
