"""The pictures that adapters are trained on: classes of the bundled renderer, or folders of pictures."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError

SHAPES_CONCEPTS = (
    "shape=circle", "shape=square", "shape=triangle", "shape=star", "colour=red", "colour=green", "colour=blue",
    "colour=yellow", "size=small", "background=black",
)  # fmt: skip
IMAGES, RECORD = "images.parquet", "metadata.json"


@dataclass(frozen=True)
class Lesson:
    """What one adapter is taught.

    Attributes:
        name: of the adapter, a plain file name.
        label: its class, for example `shape=star` or `dog`.
        class_word: what a prompt calls the class.
        images: uint8 `[N, H, W, 3]`.
        image_ids: a hash of the pixels of every image; adapters that share one belong into the same part of a split.
        seed: of its initial factors and of its noise.
        rank: of its factors.
    """

    name: str
    label: str
    class_word: str
    images: Tensor
    image_ids: tuple[str, ...]
    seed: int
    rank: int

    def facts(self) -> dict[str, Any]:
        """What the record of the adapter says about it, plain values."""
        named = {"label": self.label, "class_word": self.class_word, "rank": self.rank, "seed": self.seed}
        return {**named, "num_images": len(self.images), "image_ids": list(self.image_ids)}


def image_id(pixels: Tensor) -> str:
    """A hash (16 hexadecimal digits) of the size and the values uint8 `[H, W, 3]` of an image."""
    array = pixels.contiguous().numpy()
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:16]


def parse_concept(text: str) -> tuple[str, str]:
    """Attribute and value of a class of the renderer, written `shape=star`.

    Raises:
        InputError: an attribute or a value that the renderer does not have.
    """
    from pysteer.zoo.shapes.captions import ATTRIBUTES

    attribute, _, value = text.partition("=")
    if attribute not in ATTRIBUTES or value not in ATTRIBUTES[attribute]:
        known = "; ".join(f"{name}={'|'.join(values)}" for name, values in ATTRIBUTES.items())
        raise InputError("concept", value=text, allowed=known)
    return attribute, value


def draw_images(concept: str, count: int, seed: int) -> Tensor:
    """`count` renders uint8 `[count, 64, 64, 3]` that have the concept in common; all else is drawn at random."""
    from pysteer.zoo.shapes.captions import sample_scenes
    from pysteer.zoo.shapes.renderer import render

    attribute, value = parse_concept(concept)
    pixels = render(sample_scenes(count, seed, {attribute: value}))
    return pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def drawn_lesson(index: int, concepts: Sequence[str], images: int, ranks: Sequence[int], seed: int) -> Lesson:
    """Adapter number `index` of a collection: concepts take turns, and every adapter has pictures of its own."""
    concept = concepts[index % len(concepts)]
    digest = hashlib.sha256(json.dumps([seed, concept, index]).encode()).digest()
    own = int.from_bytes(digest[:8], "little") >> 1
    pixels = draw_images(concept, images, own)
    ids = tuple(image_id(image) for image in pixels)
    rank = ranks[(index // len(concepts)) % len(ranks)]
    name = f"{index:06d}-{concept.replace('=', '-')}"
    return Lesson(name, concept, parse_concept(concept)[1], pixels, ids, own, rank)


def list_folders(root: Path) -> list[Path]:
    """The concept folders under `root` (those with an `images.parquet` or with image files), by name.

    Raises:
        InputError: there is none.
    """
    found = [path for path in sorted(root.rglob("*")) if path.is_dir() and not path.is_symlink() and _holds(path)]
    if not found:
        raise InputError("folder of concepts", value=str(root), allowed=f"folders with {IMAGES} or with image files")
    return found


def _holds(folder: Path) -> bool:
    return (folder / IMAGES).is_file() or bool(_pictures(folder))


def _pictures(folder: Path) -> list[Path]:
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in kinds and path.is_file()]


def folder_lesson(folder: Path, root: Path, index: int, side: int, ranks: Sequence[int], seed: int) -> Lesson:
    """The adapter of a concept folder: its pictures at `side` x `side`, and its class from `metadata.json`.

    The record names the class as `category_name` (or `label`); without a record the folder above the concept does.

    Raises:
        InputError: no picture that can be read, or a record that is not one.
    """
    record = files.read_json(folder / RECORD, "concept record") if (folder / RECORD).is_file() else {}
    if not isinstance(record, dict):
        raise InputError("concept record", value=str(folder / RECORD), allowed="an object with category_name")
    label = str(record.get("category_name") or record.get("label") or folder.relative_to(root).parts[0])
    pixels = torch.stack([_square(data, side, folder) for data in _image_bytes(folder)])
    ids = tuple(image_id(image) for image in pixels)
    name = "-".join(folder.relative_to(root).parts) or folder.name
    digest = hashlib.sha256(json.dumps([seed, name]).encode()).digest()
    own = int.from_bytes(digest[:8], "little") >> 1
    return Lesson(name, label, label, pixels, ids, own, ranks[index % len(ranks)])


def _image_bytes(folder: Path) -> list[bytes]:
    if not (folder / IMAGES).is_file():
        return [path.read_bytes() for path in _pictures(folder)]
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        column = pq.read_table(folder / IMAGES, columns=["image"])["image"].to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{IMAGES} cannot be read ({error})", value=str(folder)) from error
    found: list[Any] = [item.get("bytes") if isinstance(item, dict) else item for item in column]
    if not found or not all(isinstance(item, bytes) for item in found):
        raise InputError(f"images of {folder / IMAGES}", value="no bytes", allowed="a column image with encoded bytes")
    return found


def _square(data: bytes, side: int, folder: Path) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"picture cannot be read ({error})", value=str(folder)) from error
    return torch.from_numpy(np.array(image))
