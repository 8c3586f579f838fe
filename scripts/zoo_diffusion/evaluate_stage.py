"""Stage "evaluate": generate, judge, and write evaluation.json, the sample sheet and the model card."""

from __future__ import annotations

import argparse

from pysteer.models.diffusion import ImageGenerator
from pysteer.zoo.shapes.card import write_card
from pysteer.zoo.shapes.classifier import ShapeClassifier
from zoo_diffusion.sampling import DEFAULTS
from zoo_diffusion.vae_stage import NAME
from zoo_training.common import prepare
from zoo_training.report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this stage."""
    parser.add_argument("--count", type=int, default=600, help="captions")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--guidance-scale", type=float, default=DEFAULTS["guidance_scale"])
    parser.add_argument("--num-inference-steps", type=int, default=DEFAULTS["num_inference_steps"])
    parser.add_argument("--dry", action="store_true", help="print the rates and write only the sheet, to --work")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the weights in ``--out``."""
    device = prepare(arguments)
    folder, judge = arguments.out / NAME, arguments.out / "shapes-classifier"
    generator = ImageGenerator.from_pretrained(folder).to(device)
    classifier = ShapeClassifier.from_pretrained(judge).to(device)
    settings = {name: getattr(arguments, name) for name in DEFAULTS}
    report(generator, classifier, folder, arguments, settings)
    if not arguments.dry:
        write_card(folder, judge, NAME)
