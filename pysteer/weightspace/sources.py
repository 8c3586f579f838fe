"""From classes of images to folders that an adapter each is trained on.

group_leaves   leaves of ImageNet -> ten root classes, along the is-a links of WordNet
distribute     images of leaves -> concept folders with `images.parquet` and `metadata.json`
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.errors import InputError
from pysteer.weightspace.farm.concepts import IMAGES, RECORD

ROOTS = {
    "airplane": "n02691156", "bird": "n01503061", "cat": "n02121808", "car": "n02958343", "dog": "n02084071",
    "fish": "n02512053", "fruit": "n13134947", "ship": "n04194289", "snake": "n01726692", "vegetable": "n07707451",
}  # fmt: skip
_KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Leaf:
    """A leaf class of images: its id (the name of its folder), the class it belongs to, and what it is called."""

    leaf: str
    root: str
    name: str = ""


def read_links(path: Path) -> dict[str, list[str]]:
    """Child -> parents, of a file with a line `PARENT CHILD` per link (`wordnet.is_a.txt` of ImageNet).

    Raises:
        InputError: a line of another form.
    """
    parents: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path, "is-a links"), 1):
        words = line.split()
        if len(words) != 2:
            raise InputError(f"line {number} of the is-a links", value=line, allowed="PARENT CHILD")
        parents.setdefault(words[1], []).append(words[0])
    return parents


def read_names(path: Path) -> dict[str, str]:
    """Id -> name, of a file with a line `ID NAME, OTHER NAME` per class (`LOC_synset_mapping.txt`, `words.txt`)."""
    found = {}
    for line in _lines(path, "names of classes"):
        leaf, _, name = line.replace("\t", " ").partition(" ")
        found[leaf] = name.split(",")[0].strip()
    return found


def _lines(path: Path, what: str) -> list[str]:
    if not path.is_file():
        raise InputError(f"{what} not found", value=str(path), fix="check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text", value=str(path)) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def group_leaves(
    leaves: Mapping[str, str], parents: Mapping[str, Sequence[str]], roots: Mapping[str, str] | None = None
) -> list[Leaf]:
    """The leaves that lie under one of the roots, each with the nearest root above it; by root and id.

    Args:
        leaves: id -> name.
        parents: child -> parents; cycles are harmless.
        roots: name -> id; the ten of the weight-space data sets when None.

    Raises:
        InputError: no leaf lies under any root.
    """
    wanted = {identity: name for name, identity in (roots or ROOTS).items()}
    found = []
    for leaf, name in leaves.items():
        root = _nearest(leaf, parents, wanted)
        if root is not None:
            found.append(Leaf(leaf, root, name))
    if not found:
        raise InputError("leaves", value=f"{len(leaves)}", allowed=f"some under {', '.join(sorted(wanted.values()))}")
    return sorted(found, key=lambda each: (each.root, each.leaf))


def _nearest(leaf: str, parents: Mapping[str, Sequence[str]], wanted: Mapping[str, str]) -> str | None:
    level, seen = [leaf], {leaf}
    while level:
        hit = sorted(wanted[each] for each in level if each in wanted)
        if hit:
            return hit[0]
        above = [parent for each in level for parent in parents.get(each, ())]
        level = [each for each in dict.fromkeys(above) if each not in seen]
        seen.update(level)
    return None


def write_leaves(path: Path, leaves: Sequence[Leaf]) -> Path:
    """Write leaves as JSON: `[{"leaf": ..., "root": ..., "name": ...}]`."""
    return files.write_json(path, leaves)


def read_leaves(path: Path) -> list[Leaf]:
    """Read what `write_leaves` wrote.

    Raises:
        InputError: another form, or names that are no plain folder names.
    """
    found = files.read_json(path, "leaves")
    try:
        leaves = [Leaf(str(each["leaf"]), str(each["root"]), str(each.get("name", ""))) for each in found]
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError("leaves", value=str(path), allowed="a list of objects with leaf and root") from error
    for each in leaves:
        for name in (each.leaf, each.root):
            if not re.fullmatch(r"\w[\w .-]*", name):
                raise InputError("name of a leaf", value=name, allowed="a plain folder name")
    return leaves


def folder_leaves(images: Path) -> list[Leaf]:
    """A class per folder of images: for two-class and other sets that have no hierarchy.

    Raises:
        InputError: no folder with images.
    """
    found = [Leaf(path.name, path.name, path.name) for path in sorted(images.iterdir()) if path.is_dir()]
    if not found:
        raise InputError("folder of images", value=str(images), allowed="a folder per class")
    return found


def distribute(
    images: Path, out: Path, leaves: Sequence[Leaf], *, folders: int, least: int = 4, most: int = 16, side: int = 256,
    seed: int = 0, reuse: bool = False, progress: Callable[[float, float | None], None] = lambda done, total: None,
) -> dict[str, int]:  # fmt: skip
    """Fill concept folders `OUT/ROOT/NUMBER` with `least` to `most` images of one random leaf of the root each.

    A folder holds `images.parquet` (PNG bytes of `side` x `side`, as the `datasets` library stores images) and
    `metadata.json` with `category_label`, `category_name`, `leaf_id`, `num_images` and `image_ids`. Folders that are
    complete are left as they are, so an interrupted run goes on; the same seed gives the same folders.

    Args:
        images: `IMAGES/LEAF/*.jpg`.
        folders: concept folders per root.
        reuse: shuffle a leaf's images and begin again when they are used up. Images are then shared between folders,
            and splits of adapters must be grouped by `image_ids`. Without it a root ends when its images do.

    Returns:
        Folders per root.

    Raises:
        InputError: counts that make no sense, or no images of a root.
    """
    if not 1 <= least <= most or folders < 1 or side < 1:
        raise InputError("images per folder", value=f"{least} to {most}", allowed="1 or more, least first")
    if not images.is_dir():
        raise InputError("folder of images", value=str(images), allowed="a folder per leaf")
    by_root: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_root.setdefault(leaf.root, []).append(leaf)
    made: dict[str, int] = {}
    total = folders * len(by_root)
    for label, (root, own) in enumerate(sorted(by_root.items())):
        rng = random.Random(f"{seed}-{root}")
        pools = {leaf.leaf: _Pool(images / leaf.leaf, rng, reuse) for leaf in own}
        if not any(pool.paths for pool in pools.values()):
            raise InputError(f"images of {root}", value=str(images), allowed=f"folders {own[0].leaf} and so on")
        count = 0
        for number in range(folders):
            picked = _pick(own, pools, rng, least, most)
            if picked is None:
                break
            leaf, paths = picked
            _fill(out / root / f"{number:06d}", paths, {"category_label": label, "category_name": root,
                  "leaf_id": leaf.leaf, "leaf_name": leaf.name}, side)  # fmt: skip
            count += 1
            progress(sum(made.values()) + count, total)
        made[root] = count
    return made


class _Pool:
    """The images of a leaf, handed out in random order, each once before any comes again."""

    def __init__(self, folder: Path, rng: random.Random, reuse: bool) -> None:
        self.paths = _pictures(folder)
        self.rng, self.reuse = rng, reuse
        self.left: list[Path] = []
        self._shuffle()

    def _shuffle(self) -> None:
        self.left = list(self.paths)
        self.rng.shuffle(self.left)

    def take(self, count: int, least: int) -> list[Path] | None:
        if self.reuse and len(self.left) < count and len(self.paths) >= least:
            self._shuffle()
        if len(self.left) < least:
            return None
        taken, self.left = self.left[:count], self.left[count:]
        return taken


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _KINDS and path.is_file())


def _pick(
    leaves: Sequence[Leaf], pools: Mapping[str, _Pool], rng: random.Random, least: int, most: int
) -> tuple[Leaf, list[Path]] | None:
    """A random leaf that has images left, and some of them."""
    order = list(leaves)
    rng.shuffle(order)
    count = rng.randint(least, most)
    for leaf in order:
        taken = pools[leaf.leaf].take(count, least)
        if taken is not None:
            return leaf, taken
    return None


def _fill(folder: Path, paths: Sequence[Path], record: dict[str, Any], side: int) -> None:
    if (folder / RECORD).is_file():
        return
    rows, ids = [], []
    for path, data in zip(paths, _resized(paths, side), strict=True):
        rows.append({"image": {"bytes": data, "path": path.name}})
        ids.append(hashlib.sha256(path.read_bytes()).hexdigest()[:16])
    files.write_parquet(folder / IMAGES, rows)
    files.write_json(folder / RECORD, {**record, "num_images": len(rows), "image_ids": ids})


def _resized(paths: Sequence[Path], side: int) -> Iterator[bytes]:
    from PIL import Image, UnidentifiedImageError

    for path in paths:
        try:
            image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise InputError(f"image cannot be read ({error})", value=str(path)) from error
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        yield buffer.getvalue()
