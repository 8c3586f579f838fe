"""Stage "evaluate": generate, judge, and write evaluation.json, the sample sheet and the model card."""

from __future__ import annotations

import argparse

from pysteer.models.infinity.pipeline import InfinityPipeline
from pysteer.zoo.shapes.card import write_card
from pysteer.zoo.shapes.classifier import ShapeClassifier
from zoo_training.common import prepare
from zoo_training.report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this stage."""
    parser.add_argument("--count", type=int, default=600, help="captions")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cfg", type=float, help="guidance; default: that of the pipeline")
    parser.add_argument("--tau", type=float, help="temperature; default: that of the pipeline")
    parser.add_argument("--dry", action="store_true", help="print the rates and write only the sheet, to --work")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the weights in ``--out``."""
    device = prepare(arguments)
    folder, judge = arguments.out / "infinity-shapes", arguments.out / "shapes-classifier"
    pipeline = InfinityPipeline.from_pretrained(folder, device=device)
    classifier = ShapeClassifier.from_pretrained(judge).to(device)
    settings = dict(pipeline.defaults)
    settings |= {name: value for name in ("cfg", "tau") if (value := getattr(arguments, name)) is not None}
    report(pipeline, classifier, folder, arguments, settings)
    if not arguments.dry:
        write_card(folder, judge)
