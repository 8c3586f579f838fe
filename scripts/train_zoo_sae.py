#!/usr/bin/env python3
"""Train a sparse autoencoder that comes with ``diffusion-shapes``, measure it, and write its model card.

    python scripts/train_zoo_sae.py --work WORK
    python scripts/train_zoo_sae.py --work WORK --name diffusion-shapes-attention

It is a run of the recipe ``sae`` with the settings below. Started again it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pysteer import files
from pysteer.metrics.rates import rate
from pysteer.models.sae import SparseAutoencoder
from pysteer.recipes.frame import execute
from pysteer.zoo import FOLDER

# name in the zoo -> folder, site, what the site is
PLACES = {
    "diffusion-shapes": ("diffusion-shapes-sae", "block.5", "output of the second last transformer block of the UNet"),
    "diffusion-shapes-attention": (
        "diffusion-shapes-attention-sae", "ca.6", "output of the last cross-attention of the UNet",
    ),
}  # fmt: skip
WORDS = (
    "model=diffusion-shapes",
    "count=448",
    "test_count=200",
    "steps=[1, 3, 5, 7, 9, 11, 13, 15, 17, 19]",
    "batch_size=64",
    "train.activation=topk",
    "train.k=4",
    "train.latents=96",
    "train.batch_tokens=2048",
    "train.epochs=8",
    "train.learning_rate=0.003",
    "train.dead_after=100000",
)

CARD = """---
license: apache-2.0
library_name: pysteer
---

# {folder}

A sparse autoencoder for the bundled pipeline `diffusion-shapes`: {latents} latents of which {k} are active per token,
at the site `{site}` ({place}, {width} channels, 8 x 8 tokens). Load it
with `pysteer.zoo.load_autoencoder("{name}")`.

## What it was trained on

Conditional rows of {count} generations (guidance {guidance:g}, {steps} steps, every second step) of captions that state
{fixed}; what differs is shape and colour. {epochs} epochs of {batch} tokens per step. Outside such captions its latents
also answer to places and backgrounds, and it explains less.

## What was measured, on {test} fresh captions of the same kind

| figure | value |
|---|---|
| variance unexplained (64 of the captions, {tokens:.0f} tokens) | {fvu:.1%} |
| active latents per token | {l0:.2f} |
| latents that no token activates | {dead:.1%} |
| latents active in some caption | {live} |
| of these, selective for one shape or colour | {share:.1%} [{low:.1%}, {high:.1%}] |

Selective: the area under the ROC curve for one label is above {least:g}. The score of an image is the mean of the
latent over its tokens and steps; labels are what the captions state. Brackets: 95 % Wilson interval.

Again: `python scripts/train_zoo_sae.py --name {name}`.
"""


def main() -> None:
    """Run the recipe, copy the weights, write evaluation and card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results"), help="folder of the run")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the zoo")
    parser.add_argument("--name", choices=sorted(PLACES), default="diffusion-shapes", help="name in the zoo")
    asked = parser.parse_args()
    name, site, place = PLACES[asked.name]
    run, summary = execute("sae", [*WORDS, f"site={site}"], out=asked.work, run_name=name)
    sae = SparseAutoencoder.from_pretrained(run / "sae")
    folder = asked.out / name
    sae.save_pretrained(folder)
    found = summary.headline
    selective = rate([True] * round(found["selective"] * found["live"]) + [False] * (
        found["live"] - round(found["selective"] * found["live"])
    ))  # fmt: skip
    files.write_json(folder / "evaluation.json", {**found, "selective": selective.as_dict()})
    config = files.read_json(run / "run.json", "marker of the run")["config"]
    fixed = ", ".join(f"{name} {value}" for name, value in config["fixed"].items())
    card = CARD.format(
        name=asked.name, folder=name, place=place, latents=sae.latents, k=sae.k, site=config["site"],
        width=sae.width, count=config["count"], fixed=fixed,
        guidance=config["settings"]["guidance_scale"], steps=config["settings"]["num_inference_steps"],
        epochs=config["train"]["epochs"], batch=config["train"]["batch_tokens"], test=config["test_count"],
        tokens=found["tokens"], fvu=found["fvu"], l0=found["l0"], dead=found["dead"], live=found["live"],
        share=selective.value, low=selective.low, high=selective.high, least=config["least"],
    )  # fmt: skip
    files.write_text(folder / "README.md", card)


if __name__ == "__main__":
    main()
