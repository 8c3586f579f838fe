"""Stage "evaluate": generate, judge, and write evaluation.json, the sample sheet and the model card."""

from __future__ import annotations

import argparse

from pysteer.files import write_image, write_json
from pysteer.models.infinity.pipeline import InfinityPipeline
from pysteer.zoo.shapes.captions import captions_of
from pysteer.zoo.shapes.card import EVALUATION, percent, write_card
from pysteer.zoo.shapes.classifier import ShapeClassifier
from pysteer.zoo.shapes.evaluate import evaluate, sample_sheet
from zoo_infinity.common import prepare

SHOWN = 60


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
    # Far from the seeds of the training scenes.
    found = evaluate(
        pipeline, classifier, count=arguments.count, seed=arguments.seed + 50_000, batch=arguments.batch, **settings
    )
    for group in ({"all": found.results["overall"]}, found.results["by_stated_size"], found.results["by_shape"]):
        for name, rates in group.items():
            print(f"{name:10s}", "  ".join(f"{key} {percent(value)}" for key, value in rates.items()), flush=True)
    print("no shape recognised", percent(found.results["no_shape_recognised"]), flush=True)
    page = sample_sheet(found.images[:SHOWN], captions_of(found.scenes[:SHOWN]))
    if arguments.dry:
        write_image(arguments.work / "samples.png", page)
        return
    write_json(folder / EVALUATION, found.results)
    write_image(folder / "samples.png", page)
    write_card(folder, judge)
