"""Model cards of the bundled generators, written from the measured JSON files beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pysteer.files import read_json, write_text
from pysteer.zoo.shapes.captions import STATED

EVALUATION = "evaluation.json"
TRAINING = "training.json"
_COLUMNS = ("shape", "colour", "shape_and_colour", "size", "position", "background")

_HEAD = """---
license: apache-2.0
library_name: pysteer
pipeline_tag: text-to-image
---

# {name}

{what} of 64 x 64 pictures: one coloured
shape on a plain background. It exists to develop and test steering methods on real generated images on a CPU, with a
classifier that can say what each picture shows. Load it with `pysteer.zoo.load("{name}")`{more}.

Captions read `a [small|medium|large] [COLOUR] SHAPE [at the POSITION] [on a BACKGROUND background]` with

- shapes circle, square, triangle, star, cross, ring;
- colours red, green, blue, yellow, orange, purple, cyan, pink;
- positions left, right, top, bottom, center;
- backgrounds black, white, gray (one of them if none is stated) or one of the colours, except pairs that look alike
  (for instance orange and yellow, or purple and blue).
"""

# name -> (what it is, how else it loads)
_INTRODUCTIONS = {
    "infinity-shapes": ("A small Infinity generator (next-scale prediction of binary codes, Han et al. 2024)", ""),
    "diffusion-shapes": (
        "A small latent diffusion generator in the shape of Stable Diffusion (Rombach et al. 2022: AutoencoderKL, CLIP "
        "text\nmodel, UNet with cross-attention)",
        " or\nwith `StableDiffusionPipeline.from_pretrained`: it is an ordinary diffusers folder",
    ),
}

_LIMITS = """## What it cannot do

- One object only, of these shapes and colours, on a plain background. Other words are read as unknown.
- Object and background colours that look alike were never shown to it.
- Positions are cells 8 px apart; large objects hardly move.
- Where the caption leaves the place open, a small object is sometimes broken or missing: compare the last two rows
  of the table.
- It has no notion of photographs, people or any text beyond this grammar, and says nothing about how larger models
  behave beyond sharing their architecture.
- The judge is a classifier trained on the same renderer. Its agreement is not a person's.
"""


def percent(rate: dict[str, Any]) -> str:
    """A rate with its interval as percent, for instance ``97.5 [96.0, 98.5]``; a dash where nothing was asked."""
    if not rate["n"]:
        return "-"
    return f"{100 * rate['value']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _row(name: str, rates: dict[str, Any]) -> str:
    cells = [percent(rates[column]) for column in _COLUMNS]
    return f"| {name} | {rates['shape']['n']} | " + " | ".join(cells) + " |"


def _quality(measured: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{key} {value}" for key, value in measured["settings"].items()) or "the defaults"
    lines = [
        "## How well it follows captions",
        "",
        f"{measured['count']} sampled captions, one picture each, {settings}, seed {measured['seed']}. Percent right "
        "among the captions that state the attribute, with Wilson 95 % intervals, as judged by the classifier "
        "(position: middle of the object's bounding box within 5 px of the cell).",
        "",
        "| captions | n | " + " | ".join(column.replace("_", " ") for column in _COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 2) + "|",
        _row("all", measured["overall"]),
        *(_row(f"{size} (stated)", rates) for size, rates in measured["by_stated_size"].items()),
        *(_row(shape, rates) for shape, rates in measured["by_shape"].items()),
        *(_row(words, rates) for words, rates in measured["by_position"].items()),
        "",
        f"No recognisable shape: {percent(measured['no_shape_recognised'])} %.",
        "",
        "![Samples, not selected](samples.png)",
        "",
    ]
    return lines


def _tokenizer(record: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{size} {value:.1f}" for size, value in record["psnr_by_size"].items())
    more = ""
    if decoder := record.get("decoder"):
        more = (
            f"Then {decoder['steps']} steps of the decoder alone on fixed bits, up to {100 * decoder['flip']:g} % of "
            f"them flipped, {decoder['seconds']} s. "
        )
    return [
        f"- Tokenizer: {record['parameters'] / 1e6:.2f} M parameters, 16 bits per token at sides 1, 2, 4, 6, 8. "
        f"{record['steps']} plain and {record['edge_steps']} edge-weighted steps of {record['batch']} renders, "
        f"{record['seconds']} s. {more}PSNR through the bits on {record['psnr_images']} fresh renders: "
        f"{record['psnr_mean']:.1f} dB ({sizes})."
    ]


def _transformer(record: dict[str, Any]) -> list[str]:
    settings, last = record["settings"], record["history"][-1]
    loss = sum(last["validation_loss_per_scale"]) / len(last["validation_loss_per_scale"])
    return [
        f"- Transformer and text encoder, trained jointly: {settings['steps']} steps of {settings['batch']} captioned "
        f"renders, learning rate {settings['lr']}, self-correction flips up to {settings['flip']}, "
        f"{round(record['seconds'])} s. Mean validation loss over scales {loss:.3f} nats per bit."
    ]


def _classifier(record: dict[str, Any]) -> list[str]:
    measured = record["measured"]
    heads = ", ".join(f"{head} {100 * value:.2f}" for head, value in measured["renders"].items())
    again = ", ".join(f"{head} {100 * value:.2f}" for head, value in measured["reconstructions"].items())
    none = ", ".join(
        f"{kind.removeprefix('negative_').replace('_', ' ')} {100 * rates['shape']:.1f}"
        for kind, rates in measured.items()
        if kind.startswith("negative_") and kind != "negative_two_colours"
    )
    return [
        "## The judge",
        "",
        f'`pysteer.zoo.load_classifier("shapes")`, {record["parameters"] / 1e6:.2f} M parameters, {record["steps"]} '
        "steps on renders, reconstructions and pictures of nothing. Each head also has a class for none of these.",
        "",
        f"- Percent right on 3000 fresh renders: {heads}.",
        f"- On their reconstructions through the tokenizer: {again}.",
        f"- Percent of pictures without a known shape that it calls none: {none}.",
        "",
    ]


def _vae(record: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{size} {value:.1f}" for size, value in record["psnr_by_size"].items())
    return [
        f"- Autoencoder: {record['parameters'] / 1e6:.2f} M parameters, 8 latent channels of 8 x 8, standardised per "
        f"channel. {record['steps']} steps of {record['batch']} renders, all but the first {record['plain_steps']} "
        f"edge-weighted, KL weight {record['kl']}, {record['seconds']} s. PSNR on {record['psnr_images']} fresh "
        f"renders: {record['psnr_mean']:.1f} dB ({sizes})."
    ]


def _unet(record: dict[str, Any]) -> list[str]:
    settings, last = record["settings"], record["history"][-1]
    schedule = f" Schedule: {record['schedule']}." if "schedule" in record else ""
    return [
        f"- UNet and text encoder, trained jointly on v-prediction with zero terminal SNR: {settings['steps']} steps "
        f"of {settings['batch']} captioned renders, learning rate {settings['lr']}, {100 * settings['drop']:g} % of "
        f"the captions dropped, {round(record['seconds'])} s. Validation loss {last['validation_loss']:.4f}." + schedule
    ]


# name -> (folder of the main training record, its lines, the other record's folder, its lines, script, stages)
_TRAINED = {
    "infinity-shapes": ("transformer", _transformer, "tokenizer", _tokenizer, "train_zoo_infinity.py", "classifier, "),
    "diffusion-shapes": ("unet", _unet, "vae", _vae, "train_zoo_diffusion.py", ""),
}


def write_card(folder: Path, classifier_folder: Path, name: str = "infinity-shapes") -> Path:
    """Fill README.md of the folder of the generator ``name`` from evaluation.json and the training records."""
    main, main_lines, codec, codec_lines, script, between = _TRAINED[name]
    what, more = _INTRODUCTIONS[name]
    head = _HEAD.format(name=name, what=what, more=more)
    lines = [head, *_quality(read_json(folder / EVALUATION, "evaluation")), "## How it was trained", ""]
    lines += codec_lines(read_json(folder / codec / TRAINING, f"{codec} record"))
    record = read_json(folder / main / TRAINING, f"{main} record")
    lines += main_lines(record)
    lines += [
        "- Data: rendered scenes, sizes balanced, one caption each, all from a seed. Share of the captions that state "
        f"the position: {100 * record['captions']['position']:.0f} %, of those measured above: "
        f"{100 * STATED['position']:.0f} %. Machine: {'GPU' if record['cuda'] else 'CPU'}, torch {record['torch']}.",
        f"- Again: `python scripts/{script} --stage {codec}`, then {between}{main}, evaluate.",
        "",
    ]
    lines += _classifier(read_json(classifier_folder / TRAINING, "classifier record"))
    lines.append(_LIMITS)
    return write_text(folder / "README.md", "\n".join(lines))
