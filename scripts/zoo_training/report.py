"""What the "evaluate" stages share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pysteer.files import write_image, write_json
from pysteer.zoo.shapes.captions import captions_of
from pysteer.zoo.shapes.card import EVALUATION, percent
from pysteer.zoo.shapes.classifier import ShapeClassifier
from pysteer.zoo.shapes.evaluate import evaluate, sample_sheet

SHOWN = 60


def report(
    pipeline: Callable[..., Any],
    classifier: ShapeClassifier,
    folder: Path,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
) -> None:
    """Print the rates and write evaluation.json and samples.png to the folder; with ``--dry`` the sheet to --work."""
    # Far from the seeds of the training scenes.
    found = evaluate(
        pipeline, classifier, count=arguments.count, seed=arguments.seed + 50_000, batch=arguments.batch, **settings
    )
    for group in ({"all": found.results["overall"]}, found.results["by_stated_size"], found.results["by_shape"]):
        for name, rates in group.items():
            print(f"{name:10s}", "  ".join(f"{key} {percent(value)}" for key, value in rates.items()), flush=True)
    print("no shape recognised", percent(found.results["no_shape_recognised"]), flush=True)
    page = sample_sheet(found.images[:SHOWN], captions_of(found.scenes[:SHOWN]))
    write_image((arguments.work if arguments.dry else folder) / "samples.png", page)
    if not arguments.dry:
        write_json(folder / EVALUATION, found.results)
