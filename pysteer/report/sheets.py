"""Image sheets: side-by-side grids and labelled rows, drawn with Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pysteer.errors import InputError

_PAPER = (255, 255, 255)
_INK = (28, 33, 38)
_SOFT = (90, 99, 109)
_EDGE = (214, 219, 224)
_GAP = 8


@dataclass(frozen=True)
class Row:
    """One row of a sheet: its label, a second, smaller line, and its images uint8 [N, H, W, 3]."""

    label: str
    images: Tensor
    note: str = ""


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _check(images: Tensor, name: str) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3 or images.shape[0] < 1:
        raise InputError(
            name, value=f"{images.dtype} {list(images.shape)}", allowed="uint8 [N, H, W, 3], N >= 1", fix="pass RGB"
        )


def _tile(image: Tensor, size: int) -> Image.Image:
    picture = Image.fromarray(image.cpu().contiguous().numpy(), "RGB")
    scale = size / max(picture.size)
    target = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if picture.size == target else picture.resize(target, Image.Resampling.BICUBIC)


def _paste(sheet: Image.Image, image: Tensor, x: int, y: int, size: int) -> None:
    sheet.paste(_tile(image, size), (x, y))
    # An outline keeps white pictures visible on white paper.
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + size, y + size), outline=_EDGE)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """`text` broken into at most `lines` lines of `width` pixels, the last one cut with an ellipsis."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if not wrapped[-1] or font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    cut = len(wrapped) > lines
    wrapped = wrapped[:lines]
    last = wrapped[-1]
    while last and font.getlength(last + "..." * cut) > width:
        last, cut = last[:-1].rstrip(), True
    return [*wrapped[:-1], last + "..." * cut]


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, size: int, colour: tuple[int, int, int]
) -> None:
    font = _font(size)
    for index, line in enumerate(lines):
        draw.text((x, y + index * round(size * 1.25)), line, fill=colour, font=font)


def comparison_grid(
    baseline: Tensor,
    steered: Tensor,
    prompts: Sequence[str],
    *,
    titles: tuple[str, str] = ("baseline", "steered"),
    columns: int = 4,
    tile: int = 128,
) -> Image.Image:
    """Grid of pairs, baseline on the left and steered on the right of each, with the prompt below.

    `baseline` and `steered` are uint8 [N, H, W, 3], `prompts` has N entries, `tile` is the side of a picture in pixels.
    """
    _check(baseline, "baseline")
    _check(steered, "steered")
    if baseline.shape[0] != steered.shape[0] or baseline.shape[0] != len(prompts):
        raise InputError(
            "images of the grid",
            value=f"{baseline.shape[0]} baseline, {steered.shape[0]} steered, {len(prompts)} prompts",
            allowed="equal counts",
            fix="pass one prompt per pair of images",
        )
    columns = min(columns, len(prompts))
    rows = -(-len(prompts) // columns)
    cell, caption, head = 2 * tile + 2, 38, 30
    step_x, step_y = cell + 2 * _GAP, tile + caption + _GAP
    sheet = Image.new("RGB", (columns * step_x + 2 * _GAP, rows * step_y + head + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        x = 2 * _GAP + column * step_x
        _write(draw, [titles[0]], x, 9, 14, _SOFT)
        _write(draw, [titles[1]], x + tile + 2, 9, 14, _SOFT)
    for index, prompt in enumerate(prompts):
        x = 2 * _GAP + (index % columns) * step_x
        y = head + (index // columns) * step_y
        _paste(sheet, baseline[index], x, y, tile)
        _paste(sheet, steered[index], x + tile + 2, y, tile)
        _write(draw, _fit(prompt, _font(13), cell, 2), x, y + tile + 4, 13, _INK)
    return sheet


def labelled_rows(rows: Sequence[Row], prompts: Sequence[str] = (), *, tile: int = 96) -> Image.Image:
    """Sheet with a labelled row a setting and a column a prompt; the prompts are written above the columns.

    A strength strip is the same sheet with one row a strength. Without prompts, rows may differ in length.
    """
    if not rows:
        raise InputError("rows of the sheet", value=0, allowed="at least one", fix="add rows")
    for row in rows:
        _check(row.images, f"images of row {row.label!r}")
    count = max(row.images.shape[0] for row in rows)
    if prompts and (len(prompts) != count or any(row.images.shape[0] != count for row in rows)):
        raise InputError(
            "columns of the sheet",
            value=[row.images.shape[0] for row in rows] + ([len(prompts)] if prompts else []),
            allowed="equal counts",
            fix="show the same prompts in every row",
        )
    side = 12 + min(260, max(int(_font(15).getlength(row.label)) for row in rows) + 12)
    if any(row.note for row in rows):
        side = max(side, 150)
    head = 62 if prompts else _GAP
    step = tile + 4
    sheet = Image.new("RGB", (side + count * step + _GAP, head + len(rows) * step + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        lines = _fit(prompt, _font(11), tile, 4)
        _write(draw, lines, side + column * step, head - 4 - len(lines) * 14, 11, _SOFT)
    for index, row in enumerate(rows):
        y = head + index * step
        lines = _fit(row.label, _font(15), side - 16, 2)
        notes = _fit(row.note, _font(11), side - 16, 2) if row.note else []
        top = y + (tile - 19 * len(lines) - 14 * len(notes)) // 2
        _write(draw, lines, 12, top, 15, _INK)
        _write(draw, notes, 12, top + 19 * len(lines), 11, _SOFT)
        for column in range(row.images.shape[0]):
            _paste(sheet, row.images[column], side + column * step, y, tile)
    return sheet


def png(image: Image.Image) -> bytes:
    """`image` as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
