"""Images to train on: Fashion-MNIST, glyphs of installed fonts, rendered shapes, folders, data sets of the hub."""

from __future__ import annotations

import gzip
import hashlib
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer.errors import InputError
from pysteer.recipes.vae.config import DataPart

FASHION = Path("/usr/share/datasets/fashion-mnist")
FONTS = (Path("/usr/share/fonts"), Path.home() / ".local/share/fonts", Path("/usr/local/share/fonts"))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_HELD_OUT = 8  # one glyph in so many belongs to the test split
_TEST_SHAPES = 1 << 20  # seed of the first scene of the test split


class Images:
    """Images by number.

    Args:
        count: how many.
        get: gives those with the numbers `[k]` as fp32 [k, 3, R, R] in [-1, 1].
        about: what they are, for the report.
    """

    def __init__(self, count: int, get: Callable[[Sequence[int]], Tensor], about: str) -> None:
        if count < 1:
            raise InputError("images of the data set", value=count, allowed="at least one", fix="check the split")
        self.count, self.about, self._get = count, about, get

    def __len__(self) -> int:
        return self.count

    def batch(self, numbers: Sequence[int]) -> Tensor:
        """The images with these numbers, fp32 [k, 3, R, R] in [-1, 1]."""
        return self._get(numbers)

    def first(self, count: int | None) -> Images:
        """The first `count` of them, all when None."""
        return self if count is None else Images(min(count, self.count), self._get, self.about)


def open_images(data: DataPart, split: str, *, validation: bool = False) -> Images:
    """The images of a split.

    Raises:
        InputError: a data set that is not there, with what to install; a split it does not have; no images.
    """
    name = data.validation_dataset_name if validation and data.validation_dataset_name else data.dataset_name
    limit = data.validation_max_samples if validation else data.max_samples
    known = {"fashion-mnist": _fashion, "glyphs": _glyphs, "shapes": _shapes}
    if name in known:
        if split not in ("train", "test", "validation"):
            raise InputError(f"split of {name}", value=split, allowed="train, test")
        return known[name](data, "test" if split == "validation" else split, limit)
    if Path(name).expanduser().is_dir():
        return _folder(Path(name).expanduser(), data, split).first(limit)
    config = data.validation_dataset_config_name if validation else ""
    return _hub(name, config or data.dataset_config_name, data, split).first(limit)


def _grey(pixels: Tensor, resolution: int) -> Callable[[Sequence[int]], Tensor]:
    """uint8 [N, H, W] given as three equal channels, scaled to the resolution; 28 pixels are framed to 32."""
    if pixels.shape[-1] < resolution <= pixels.shape[-1] + 8:
        frame = resolution - pixels.shape[-1]
        pixels = F.pad(pixels, (frame // 2, frame - frame // 2, frame // 2, frame - frame // 2))

    def get(numbers: Sequence[int]) -> Tensor:
        x = pixels[torch.as_tensor(numbers)].float().div(127.5).sub(1)[:, None]
        if x.shape[-1] != resolution:
            x = F.interpolate(x, size=(resolution, resolution), mode="bilinear", antialias=True)
        return x.expand(-1, 3, -1, -1).contiguous()

    return get


def _fashion(data: DataPart, split: str, limit: int | None) -> Images:
    folder = Path(data.path).expanduser() if data.path else FASHION
    path = folder / f"{'train' if split == 'train' else 't10k'}-images-idx3-ubyte.gz"
    if not path.is_file():
        fix = "install Debian's package dataset-fashion-mnist, or give data.path=FOLDER of the .gz files"
        raise InputError("Fashion-MNIST is not there", value=str(path), allowed=path.name, fix=fix)
    try:
        with gzip.open(path, "rb") as stream:
            raw = stream.read()
        magic, count, rows, columns = struct.unpack(">4i", raw[:16])
        if magic != 2051 or len(raw) != 16 + count * rows * columns:
            raise ValueError("not an idx file of images")
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise InputError(f"Fashion-MNIST cannot be read ({error})", value=str(path), fix="install it again") from error
    pixels = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(count, rows, columns).copy())
    images = Images(count, _grey(pixels, data.resolution), f"Fashion-MNIST, {split}")
    return images.first(limit)


def find_fonts(path: str = "") -> list[Path]:
    """Font files below `path`, or of the system; those that come with matplotlib where there are none."""
    places = [Path(path).expanduser()] if path else list(FONTS)
    found = sorted(p for place in places for p in place.rglob("*") if p.suffix.lower() in (".ttf", ".otf"))
    if not found and not path:
        import matplotlib

        found = sorted((Path(matplotlib.get_data_path()) / "fonts/ttf").glob("DejaVu*.ttf"))
    if not found:
        raise InputError(
            "fonts", value=path, allowed="a folder with .ttf or .otf files", fix="install a fonts- package"
        )
    return found


def _glyphs(data: DataPart, split: str, limit: int | None) -> Images:
    """Letters and digits of all fonts, black on white; which glyphs are held out depends on font and letter alone."""
    fonts = find_fonts(data.path)
    chosen = []
    for font in fonts:
        for letter in LETTERS:
            mark = hashlib.sha256(f"{font.name} {letter}".encode()).digest()
            if (mark[0] % _HELD_OUT == 0) == (split == "test"):
                chosen.append((mark, font, letter))
    chosen.sort(key=lambda item: item[0])  # mixed, and the same whatever the limit
    pixels = _render_glyphs([(font, letter) for _, font, letter in chosen[:limit]], data.resolution)
    return Images(len(pixels), _grey(pixels, data.resolution), f"glyphs of {len(fonts)} fonts, {split}")


def _render_glyphs(wanted: Sequence[tuple[Path, str]], side: int) -> Tensor:
    """uint8 [N, side, side]; each glyph fills three quarters of its square."""
    from PIL import Image, ImageDraw, ImageFont

    made: dict[Path, Any] = {}
    pictures = []
    for path, letter in wanted:
        if path not in made:
            try:
                made[path] = ImageFont.truetype(str(path), side * 3)
            except OSError as error:
                raise InputError(
                    f"font cannot be read ({error})", value=str(path), fix="give data.path=FOLDER"
                ) from error
        left, top, right, bottom = (int(edge) for edge in made[path].getbbox(letter))
        size = max(1, right - left, bottom - top)
        large = Image.new("L", (size * 4 // 3 + 1, size * 4 // 3 + 1), 255)
        place = ((large.width - right + left) // 2 - left, (large.height - bottom + top) // 2 - top)
        ImageDraw.Draw(large).text(place, letter, font=made[path], fill=0)
        picture = np.asarray(large.resize((side, side), Image.Resampling.BOX))
        if picture.min() < picture.max():  # fonts of symbols have no letters, or blank ones
            pictures.append(picture)
    if not pictures:
        raise InputError("glyphs", value="none", allowed="at least one", fix="install more fonts")
    return torch.from_numpy(np.stack(pictures))


def _shapes(data: DataPart, split: str, limit: int | None) -> Images:
    from pysteer.zoo.shapes.captions import sample_scene
    from pysteer.zoo.shapes.renderer import render

    count = limit or (16384 if split == "train" else 2048)
    first = 0 if split == "train" else _TEST_SHAPES

    def get(numbers: Sequence[int]) -> Tensor:
        x = render([sample_scene(random.Random(first + int(number))) for number in numbers]) * 2 - 1
        if x.shape[-1] == data.resolution:
            return x
        return F.interpolate(x, size=(data.resolution, data.resolution), mode="bilinear", antialias=True)

    return Images(count, get, f"rendered shapes, {split}")


def from_picture(picture: Any, resolution: int) -> Tensor:
    """A PIL image scaled so that its short side fits, cut in the middle: fp32 [3, R, R] in [-1, 1]."""
    from PIL import Image

    picture = picture.convert("RGB")
    scale = resolution / min(picture.size)
    size = [max(resolution, round(side * scale)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    pixels = np.asarray(picture.crop((left, top, left + resolution, top + resolution)))
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).float().div(127.5).sub(1)


def _folder(folder: Path, data: DataPart, split: str) -> Images:
    """All pictures below `folder/<split>`; without such a folder, below `folder`, one in eight held out."""
    from PIL import Image

    own = folder / split
    paths = sorted(p for p in (own if own.is_dir() else folder).rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not own.is_dir():
        held = split != data.train_split_name
        paths = [p for i, p in enumerate(paths) if (i % _HELD_OUT == _HELD_OUT - 1) == held]
    if data.skip_unreadable:
        paths = [p for p in paths if _readable(p)]

    def one(number: int) -> Tensor:
        try:
            with Image.open(paths[number]) as picture:
                return from_picture(picture, data.resolution)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            fix = "delete it, or set data.skip_unreadable=true; the same command goes on from the last checkpoint"
            raise InputError(f"image cannot be read ({error})", value=str(paths[number]), fix=fix) from error

    return Images(len(paths), _each(one, data.num_workers), f"{folder.name}, {split}")


def _readable(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _each(one: Callable[[int], Tensor], workers: int) -> Callable[[Sequence[int]], Tensor]:
    """Images one by one, read by a few threads: decoding leaves the interpreter free."""
    if workers < 2:
        return lambda numbers: torch.stack([one(int(number)) for number in numbers])
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(workers)
    return lambda numbers: torch.stack(list(pool.map(one, [int(number) for number in numbers])))


def _hub(name: str, config: str, data: DataPart, split: str) -> Images:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        allowed = "glyphs, fashion-mnist, shapes, a folder of images, or a name of the hub with `datasets` installed"
        raise InputError("data set", value=name, allowed=allowed, fix="pip install datasets") from error
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # network, names, splits: the library has an error of its own for each
        raise InputError(
            f"data set cannot be loaded ({error})", value=name, fix="check name, split and network"
        ) from error
    return of_table(table, data, f"{name}, {split}")


def of_table(table: Any, data: DataPart, about: str) -> Images:
    """The images of a data set of `datasets`; the columns image and img stand for each other.

    Raises:
        InputError: there is no such column.
    """
    columns = list(table.column_names)
    other = {"image": "img", "img": "image"}.get(data.image_column, data.image_column)
    column = next((name for name in (data.image_column, other) if name in columns), None)
    if column is None:
        raise InputError("data.image_column", value=data.image_column, allowed=", ".join(columns))

    def one(number: int) -> Tensor:
        try:
            return from_picture(table[number][column], data.resolution)
        except (OSError, ValueError, SyntaxError, AttributeError) as error:
            raise InputError(f"image {number} of {about} cannot be read ({error})", fix="leave it out") from error

    return Images(len(table), _each(one, data.num_workers), about)
