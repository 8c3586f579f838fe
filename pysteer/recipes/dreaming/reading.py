"""The stages that read: provision, capture and timestep_analysis."""

from __future__ import annotations

from typing import Any

import torch

from pysteer.dream.analysis import Analysis, analyse, image_scores
from pysteer.dream.capture import CapturePlan, capture_features, read_blocks
from pysteer.dream.features import Features
from pysteer.dream.parts import Parts
from pysteer.dream.selectivity import Selectivity, selectivity
from pysteer.recipes.dreaming.studio import Studio


def provision(studio: Studio) -> None:
    """Have model, autoencoder and prompts here, downloading what is named on the hub, and say what they are."""
    features = {kind: {"count": f.count, "digest": f.digest()} for kind, f in studio.features.items()}
    site = {"name": studio.site.name, "path": studio.site.path, "width": studio.site.width}
    prompts = len(studio.captions.texts)
    studio.run.write_json("provision.json", {"site": site, "features": features, "prompts": prompts})
    for kind, known in features.items():
        studio.run.log.info("%s: %d features at %s", kind, known["count"], studio.site.name)


def capture_plan(studio: Studio) -> CapturePlan:
    """What the stage capture runs."""
    c, told = studio.config.capture, studio.captions
    each = range(c.num_images_per_prompt)
    rows = [(number, text, label) for number, (text, label) in enumerate(zip(told.texts, told.labels, strict=True))]
    rows = [row for row in rows for _ in each]
    return CapturePlan(
        prompts=[text for _, text, _ in rows], labels=[label for _, _, label in rows],
        numbers=[number for number, _, _ in rows], seeds=[studio.config.seed + i for i in range(len(rows))],
        rows=c.rows, top_k=c.top_k, block=c.batch_size, maps=c.maps, settings=studio.config.settings,
    )  # fmt: skip


def run_capture(studio: Studio) -> Parts:
    """Run the prompts of this process; blocks that are there are skipped."""
    plan = capture_plan(studio)
    with studio.run.progress.task("captured", len(studio.share.of(range(len(plan.prompts))))) as advance:
        return capture_features(
            studio.pipe, plan, list(studio.features.values()), studio.run.path("capture/x").parent,
            share=studio.share, advance=advance,
        )  # fmt: skip


def run_analysis(studio: Studio) -> None:
    """Frequencies, peaks and examples of all features, and what labels they tell where the prompts have some."""
    c, run = studio.config.timestep_analysis, studio.run
    parts = studio.parts(c.capture_run, "capture")
    blocks = len(list(parts))
    for kind, features in studio.features.items():
        with run.progress.task(f"blocks analysed ({kind})", blocks) as advance:
            found = analyse(parts, kind, c.rows, top_k=c.top_k, examples=c.examples, advance=advance)
        found.save(run.path(f"timestep_analysis/{kind}.safetensors"))
        told = labelled(studio, parts, features)
        run.write_parquet(f"timestep_analysis/{kind}.parquet", feature_rows(studio, found, told))
        run.write_parquet(f"timestep_analysis/{kind}-examples.parquet", example_rows(studio, parts, found))
        mark = {"features": features.digest(), "capture": parts.content(), "kind": kind, "rows": c.rows}
        run.write_json(f"timestep_analysis/{kind}.json", mark)
        run.log.info("%s: %d of %d features are active", kind, int(found.live.sum()), features.count)


def labelled(studio: Studio, parts: Parts, features: Features) -> Selectivity | None:
    """Selectivity of the features for what the captured prompts state; None where they state nothing known."""
    told, each = studio.captions, studio.config.capture.num_images_per_prompt
    rows = parts.identity["prompts"]
    if not told.attributes or len(told.texts) * each != rows:
        return None
    scores = image_scores(parts, features.kind, studio.config.timestep_analysis.rows, features.count)
    if len(scores) != rows:
        return None
    words = {name: [word for word in found for _ in range(each)] for name, found in told.attributes.items()}
    return selectivity(scores, words)


def feature_rows(studio: Studio, found: Analysis, told: Selectivity | None) -> list[dict[str, Any]]:
    """A row per feature: activity, peaks, intervals, and the label it tells best."""
    c = studio.config.timestep_analysis
    activity = found.activity()
    best, which = told.best() if told is not None else (torch.zeros(len(activity)), None)
    rows = []
    for feature in range(len(activity)):
        peaks = found.peaks(
            feature, threshold=c.peak_threshold, separation=c.peak_separation, most=c.top_peak_count,
            total=c.total_timesteps,
        )  # fmt: skip
        area = float(best[feature])
        label = told.names[int(which[feature])] if told is not None and which is not None and area > 0 else ""
        rows.append(
            {
                "feature": feature,
                "live": bool(found.live[feature]),
                "activity": float(activity[feature]),
                "mean": float(found.mean[feature].mean()),
                "largest": float(found.most[feature].max()),
                "peaks": [peak for peak, _ in peaks],
                "peak_heights": [height for _, height in peaks],
                "intervals": [list(pair) for pair in found.intervals(feature)],
                "label": label,
                "area": area,
            }
        )
    return rows


def example_rows(studio: Studio, parts: Parts, found: Analysis) -> list[dict[str, Any]]:
    """A row per feature, timestep and place: the captured row that activates the feature so much."""
    columns = ("row", "prompt", "text", "seed")
    known = {
        row["row"]: row
        for block in read_blocks(parts, found.kind, found.role, columns)
        for row in block.rows
    }  # fmt: skip
    rows = []
    for feature in found.live.nonzero()[:, 0].tolist():
        for place, time in enumerate(found.timesteps.tolist()):
            numbers, values = found.example_rows[feature, place].tolist(), found.example_values[feature, place].tolist()
            for rank, (number, value) in enumerate(zip(numbers, values, strict=True)):
                if number >= 0:
                    origin = known[number]
                    rows.append(
                        {"feature": feature, "timestep": time, "rank": rank, "row": number, "value": value,
                         "prompt": origin["prompt"], "text": origin["text"], "seed": origin["seed"]}
                    )  # fmt: skip
    return rows
