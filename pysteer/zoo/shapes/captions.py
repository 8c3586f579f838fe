"""Scenes, captions and the word tokenizer of the shapes task.

A caption is ``a [SIZE] [COLOUR] SHAPE [at the POSITION] [on a BACKGROUND background]``. What a caption leaves out is
drawn at random, except the background, which is then one of the three neutral ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pysteer.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_SIDE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")
NEUTRALS = ("black", "white", "gray")
BACKGROUNDS = NEUTRALS + COLOURS
SIZES = ("small", "medium", "large")
POSITIONS = ("left", "right", "top", "bottom", "center")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "position": POSITIONS,
    "background": BACKGROUNDS,
}

RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.12),
    "green": (0.10, 0.66, 0.20),
    "blue": (0.12, 0.24, 0.90),
    "yellow": (1.00, 0.88, 0.10),
    "orange": (1.00, 0.52, 0.04),
    "purple": (0.52, 0.14, 0.68),
    "cyan": (0.12, 0.84, 0.92),
    "pink": (1.00, 0.56, 0.76),
    "black": (0.04, 0.04, 0.04),
    "white": (0.96, 0.96, 0.96),
    "gray": (0.50, 0.50, 0.50),
}

# Too close to tell apart reliably, so never together as object and background (either way round).
_NEAR = (
    "orange yellow",
    "orange red",
    "orange pink",
    "purple blue",
    "purple pink",
    "pink red",
    "cyan blue",
    "cyan green",
    "yellow green",
)
FORBIDDEN = frozenset(frozenset(pair.split()) for pair in _NEAR)

# Smallest and largest radius in pixels, and how many 8-px steps the centre may lie off the middle so that the object,
# jitter included, stays at least 2 px inside the frame. Radius and jitter are whole pixels: a finite set of outlines
# is far easier for a small generator to draw consistently than a continuum.
RADIUS = {"small": (9, 11), "medium": (13, 15), "large": (18, 21)}
REACH = {"small": 2, "medium": 1, "large": 1}
STEP = 8
JITTER = 1
STATED = {"size": 0.60, "colour": 0.95, "position": 0.80, "background": 0.85}
MAX_TOKENS = 20
_STEP_OF = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}


@dataclass(frozen=True)
class Scene:
    """One object on a plain background.

    ``x``, ``y`` (centre) and ``radius`` (half the extent) are in pixels of a 64 x 64 image, y downwards. ``stated``
    names the attributes the caption mentions; ``position`` is the cell's word, or "" where no word describes it.
    """

    shape: str
    colour: str
    size: str
    position: str
    background: str
    x: float
    y: float
    radius: float
    stated: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The text that describes this scene."""
        words = ["a"]
        words += [self.size] if "size" in self.stated else []
        words += [self.colour] if "colour" in self.stated else []
        words.append(self.shape)
        words += ["at", "the", self.position] if "position" in self.stated else []
        words += ["on", "a", self.background, "background"] if "background" in self.stated else []
        return " ".join(words)


def compatible(colour: str, background: str) -> bool:
    """Whether an object of this colour is clearly visible on this background."""
    return colour != background and frozenset((colour, background)) not in FORBIDDEN


def offset_of(position: str, size: str) -> tuple[int, int]:
    """The grid cell (columns, rows from the middle, in 8-px steps) that a position word means for a size."""
    column, row = _STEP_OF[position]
    return column * REACH[size], row * REACH[size]


def cell_position(size: str, column: int, row: int) -> str:
    """The position word of a grid cell (in 8-px steps from the middle), or "" where none applies.

    "left" is the outermost column that this size reaches, in the middle row; the others likewise.
    """
    return next((word for word in POSITIONS if offset_of(word, size) == (column, row)), "")


def _check(attribute: str, value: str) -> None:
    if attribute not in ATTRIBUTES:
        raise InputError("scene attribute", value=attribute, allowed=", ".join(ATTRIBUTES), fix="name one of these")
    if value not in ATTRIBUTES[attribute]:
        raise InputError(
            f"scene {attribute}", value=value, allowed=", ".join(ATTRIBUTES[attribute]), fix="use one of these words"
        )


def sample_scene(rng: random.Random, fixed: dict[str, str] | None = None) -> Scene:
    """Draw one scene. ``fixed`` gives attributes that are set and stated, e.g. ``{"colour": "red"}``."""
    fixed = fixed or {}
    for attribute, value in fixed.items():
        _check(attribute, value)
    stated = {name for name, chance in STATED.items() if rng.random() < chance} | set(fixed)
    shape = fixed.get("shape") or rng.choice(SHAPES)
    size = fixed.get("size") or rng.choice(SIZES)
    background = fixed.get("background") or ""
    colour = fixed.get("colour") or rng.choice([c for c in COLOURS if not background or compatible(c, background)])
    if not background:
        coloured = "background" in stated and rng.random() < 0.5
        background = rng.choice([b for b in (COLOURS if coloured else NEUTRALS) if compatible(colour, b)])
    elif not compatible(colour, background):
        raise InputError(
            "object colour on background",
            value=f"{colour} on {background}",
            allowed="pairs that are clearly different",
            fix="choose another background",
        )
    reach = REACH[size]
    if "position" in stated:
        position = fixed.get("position") or rng.choice(POSITIONS)
        column, row = offset_of(position, size)
    else:
        column, row = rng.randint(-reach, reach), rng.randint(-reach, reach)
        position = cell_position(size, column, row)
    middle = IMAGE_SIDE / 2
    return Scene(
        shape=shape,
        colour=colour,
        size=size,
        position=position,
        background=background,
        x=middle + STEP * column + rng.randint(-JITTER, JITTER),
        y=middle + STEP * row + rng.randint(-JITTER, JITTER),
        radius=float(rng.randint(*RADIUS[size])),
        stated=tuple(name for name in ATTRIBUTES if name in stated or name == "shape"),
    )


def sample_scenes(count: int, seed: int, fixed: dict[str, str] | None = None) -> list[Scene]:
    """``count`` scenes from a seed; the same seed gives the same scenes."""
    rng = random.Random(seed)
    return [sample_scene(rng, fixed) for _ in range(count)]


def swap(scene: Scene, attribute: str, value: str) -> Scene:
    """The same scene (place, radius, other attributes, stated words) with one attribute changed and stated.

    Only shape, colour and background can be swapped: a size or position would move the object. InputError where the
    new object and background colours are too close.
    """
    _check(attribute, value)
    if attribute not in ("shape", "colour", "background"):
        raise InputError("swapped attribute", value=attribute, allowed="shape, colour, background", fix="swap another")
    stated = tuple(name for name in ATTRIBUTES if name in scene.stated or name == attribute)
    fields: dict[str, Any] = {attribute: value, "stated": stated}
    swapped = replace(scene, **fields)
    if not compatible(swapped.colour, swapped.background):
        raise InputError(
            "swapped scene",
            value=f"{swapped.colour} on {swapped.background}",
            allowed="clearly different object and background colours",
            fix="sample scenes with sample_pairs, which avoids such backgrounds",
        )
    return swapped


def sample_pairs(
    count: int, attribute: str, source: str, target: str, seed: int, fixed: dict[str, str] | None = None
) -> list[tuple[Scene, Scene]]:
    """``count`` pairs of scenes that differ in one attribute (source value, target value); both are drawable.

    ``fixed`` sets further attributes on both sides.
    """
    _check(attribute, target)
    rng = random.Random(seed)
    pairs: list[tuple[Scene, Scene]] = []
    while len(pairs) < count:
        scene = sample_scene(rng, {**(fixed or {}), attribute: source})
        changed = {"colour": scene.colour, "background": scene.background, attribute: target}
        if compatible(changed["colour"], changed["background"]):
            pairs.append((scene, swap(scene, attribute, target)))
    return pairs


def parse_caption(caption: str) -> dict[str, str]:
    """The attributes a caption states, e.g. ``{"shape": "circle", "colour": "red"}``; InputError if it is not one."""
    words = caption.lower().split()
    found: dict[str, str] = {}
    if "on" in words:
        cut = words.index("on")
        tail, words = words[cut:], words[:cut]
        if len(tail) == 4 and tail[1] == "a" and tail[3] == "background":
            found["background"] = tail[2]
    if "at" in words:
        cut = words.index("at")
        tail, words = words[cut:], words[:cut]
        if len(tail) == 3 and tail[1] == "the":
            found["position"] = tail[2]
    for word in words[1:]:
        for attribute in ("size", "colour", "shape"):
            if word in ATTRIBUTES[attribute]:
                found[attribute] = word
    rebuilt = Scene(
        shape=found.get("shape", ""),
        colour=found.get("colour", ""),
        size=found.get("size", ""),
        position=found.get("position", ""),
        background=found.get("background", ""),
        x=0.0,
        y=0.0,
        radius=0.0,
        stated=tuple(found),
    )
    known = all(value in ATTRIBUTES[name] for name, value in found.items())
    if not known or "shape" not in found or rebuilt.caption != " ".join(caption.lower().split()):
        raise InputError(
            "caption",
            value=caption,
            allowed="a [size] [colour] shape [at the position] [on a colour background]",
            fix="use the words of pysteer.zoo.shapes.captions.ATTRIBUTES",
        )
    return found


def vocabulary() -> dict[str, int]:
    """Word -> id. 0 is padding, 1 the end mark (as in T5), 2 unknown."""
    words: Iterable[str] = ("<pad>", "</s>", "<unk>", "a", "at", "the", "on", "background")
    words = [*words, *SIZES, *COLOURS, *NEUTRALS, *SHAPES, *POSITIONS]
    return {word: index for index, word in enumerate(words)}


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level transformers tokenizer: lower case, whitespace split, end mark appended, at most 20 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair=None, special_tokens=[("</s>", words["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        padding_side="right",
    )


def captions_of(scenes: Sequence[Scene]) -> list[str]:
    """The captions of a list of scenes."""
    return [scene.caption for scene in scenes]
