"""The stage representation: everything about the features in one folder, with the judgement of what was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.dream.analysis import Analysis
from pysteer.dream.parts import Parts
from pysteer.dream.representation import RepresentationWriter
from pysteer.metrics.rates import Rate, rate
from pysteer.recipes.dreaming.making import decode_png
from pysteer.recipes.dreaming.studio import Studio
from pysteer.zoo import load_classifier
from pysteer.zoo.shapes.captions import ATTRIBUTES, IMAGE_SIDE

_JUDGED = ("shape", "colour")
_FIGURES = ("activation", "total_variation", "range", "moment", "loss")


def table_of(parts: Parts) -> list[dict[str, Any]]:
    """All rows of the tables of the parts."""
    import pyarrow.parquet as pq

    return [row for part in parts for row in pq.read_table(part.files["parquet"]).to_pylist()]


def run_representation(studio: Studio) -> dict[str, list[dict[str, Any]]]:
    """Write the representation; returns per role the judged images, a row each."""
    c, run = studio.config.representation, studio.run
    writer = RepresentationWriter(run.path("representation/x").parent)
    judged: dict[str, list[dict[str, Any]]] = {}
    for kind in studio.features:
        found = studio.analysis(c.timestep_analysis_run, kind)
        features = _feature_table(studio, kind)
        writer.add_features(found, features)
        labels = {row["feature"]: row["label"] for row in features if row["area"] > _LEAST}
        drawn = _add_priors(studio, writer, kind)
        dreamed = _add_dreams(studio, writer, kind, c.deep_dream_run, "noise")
        if c.deep_dream_no_noise_run:
            _add_dreams(studio, writer, kind, c.deep_dream_no_noise_run, "no_noise")
        shown = sorted({row["feature"] for row in drawn})
        _add_examples(studio, writer, found, kind, shown)
        for role, rows in (("prior", drawn), ("dream", dreamed)):
            judged[f"{kind}.{role}"] = judge_rows(rows, labels)
    about = {"model": studio.config.model, "site": studio.site.name, "settings": studio.config.settings}
    writer.finish({**about, "total_timesteps": studio.config.timestep_analysis.total_timesteps})
    return judged


_LEAST = 0.9  # area under the ROC curve from which a feature is taken for its label


def _feature_table(studio: Studio, kind: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    folder = studio.folder(studio.config.representation.timestep_analysis_run)
    rows: list[dict[str, Any]] = pq.read_table(folder / f"timestep_analysis/{kind}.parquet").to_pylist()
    return rows


def _add_priors(studio: Studio, writer: RepresentationWriter, kind: str) -> list[dict[str, Any]]:
    rows = table_of(studio.parts(studio.config.representation.prior_run, "prior", kind))
    for row in rows:
        writer.add_image(
            row["png"], kind=kind, feature=row["feature"], role="prior", cover=True, timestep=row["timestep"],
            seed=row["seed"], value=row["strength"],
        )  # fmt: skip
    return rows


def _add_dreams(
    studio: Studio, writer: RepresentationWriter, kind: str, run_name: str, variant: str
) -> list[dict[str, Any]]:
    rows = table_of(studio.parts(run_name, "deep_dream", kind))
    for row in rows:
        writer.add_image(
            row["png"], kind=kind, feature=row["feature"], role="dream" if row["final"] else "snapshot",
            variant=variant, timestep=row["timestep"], seed=row["seed"], step=row["step"], value=row["activation"],
            figures={name: row[name] for name in _FIGURES},
        )  # fmt: skip
    return [row for row in rows if row["final"]]


def _add_examples(studio: Studio, writer: RepresentationWriter, found: Analysis, kind: str, shown: list[int]) -> None:
    """The captured images that activate a feature most, at its peaks (at its most active step where it has none)."""
    import pyarrow.parquet as pq

    c, peaks = studio.config.representation, studio.config.timestep_analysis
    wanted: dict[int, list[tuple[int, int, int, float]]] = {}  # row -> (feature, place, rank, value)
    for feature in shown:
        at = [found.step_of(peak) for peak, _ in found.peaks(
            feature, threshold=peaks.peak_threshold, separation=peaks.peak_separation, most=peaks.top_peak_count,
            total=peaks.total_timesteps,
        )] or [int(found.frequency[feature].argmax())]  # fmt: skip
        for place in dict.fromkeys(at):
            for rank in range(min(c.examples, found.example_rows.shape[2])):
                row = int(found.example_rows[feature, place, rank])
                if row >= 0:
                    strength = float(found.example_values[feature, place, rank])
                    wanted.setdefault(row, []).append((feature, place, rank, strength))
    analysis = studio.config.timestep_analysis
    parts = studio.parts(analysis.capture_run, "capture")
    for part in parts:
        table = pq.read_table(part.files["parquet"], columns=["row", "text", "seed", "png"]).to_pylist()
        places = {row["row"]: i for i, row in enumerate(table)}
        if not any(row in wanted for row in places):
            continue
        maps = _Maps.of(part.files["safetensors"], kind, analysis.rows)
        for number, i in places.items():
            for feature, place, rank, value in wanted.get(number, ()):
                if table[i]["png"]:
                    writer.add_image(
                        table[i]["png"], kind=kind, feature=feature, role="example", rank=rank, value=value,
                        timestep=float(found.timesteps[place]), seed=table[i]["seed"], text=table[i]["text"],
                        map=maps.get(i, float(found.timesteps[place]), feature),
                    )  # fmt: skip


@dataclass(frozen=True)
class _Maps:
    """Token by token activations of a block, where they were captured."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, path: Any, kind: str, role: str) -> _Maps:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stream:
            names = {f"{kind}.{role}.maps": "maps", f"{kind}.{role}.indices": "indices", "timesteps": "timesteps"}
            if f"{kind}.{role}.maps" not in stream.keys():  # noqa: SIM118 (not a mapping)
                return cls({})
            return cls({short: stream.get_tensor(name) for name, short in names.items()})

    def get(self, row: int, timestep: float, feature: int) -> list[float] | None:
        """The map of a feature, None where it was not kept."""
        if not self.tensors:
            return None
        step = int((self.tensors["timesteps"] - timestep).abs().argmin())
        place = (self.tensors["indices"][row, step] == feature).nonzero()[:, 0]
        return self.tensors["maps"][row, step, int(place[0])].float().tolist() if len(place) else None


def judge_rows(rows: list[dict[str, Any]], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """What the bundled classifier sees in images of features that stand for a shape or a colour.

    Args:
        rows: with feature and png.
        labels: feature -> `attribute=word`; others are not judged.

    Returns:
        A row per judged image: feature, attribute, wanted, seen, hit, chance (one over the number of classes).
    """
    kept = [row for row in rows if labels.get(row["feature"], "").partition("=")[0] in _JUDGED]
    images = [decode_png(row["png"]) for row in kept]
    if not images or images[0].shape[:2] != (IMAGE_SIDE, IMAGE_SIDE):
        return []
    verdict = load_classifier("shapes").classify(torch.stack(images))
    found = []
    for i, row in enumerate(kept):
        attribute, _, wanted = labels[row["feature"]].partition("=")
        seen = verdict.labels[attribute][i]
        chance = 1 / len(ATTRIBUTES[attribute])
        found.append(
            {"feature": row["feature"], "attribute": attribute, "wanted": wanted, "seen": seen,
             "hit": seen == wanted, "chance": chance}
        )  # fmt: skip
    return found


def judged_rate(rows: list[dict[str, Any]]) -> tuple[Rate, float]:
    """Share of the images that show the label of their feature, and the share that chance would give."""
    hits = [bool(row["hit"]) for row in rows]
    chance = sum(row["chance"] for row in rows) / len(rows) if rows else float("nan")
    return rate(hits), chance
