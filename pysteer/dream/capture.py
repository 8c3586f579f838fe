"""Capture: what the features of a site do while a pipeline draws prompts, in blocks on disk, in constant memory.

Of every row (one prompt and seed) and every denoising step it keeps the `top_k` features with the largest mean over the
tokens, with exactly those means, and the image; of all features together their sum, largest value, smallest value and
number of rows where they are active, per step. Conditional rows are told from unconditional ones by the family, so a
row always belongs to its own prompt.

A block of rows is one item of `pysteer.dream.parts`, with the files

    part-*.safetensors   `{kind}.{role}.values` fp32 and `.indices` int32 `[n, S, K]`; `{kind}.{role}.sum`, `.max`,
                         `.min` fp32, `.active` int64 `[S, M]`; with maps `{kind}.{role}.maps` fp16 `[n, S, K, L]`;
                         `timesteps` `[S]`
    part-*.parquet       row, prompt, text, label, seed, png (the image)

where kind is `raw` or `sae` and role is `cond` or `uncond`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.capture.stream import fingerprint
from pysteer.capture.taps import PartRows, tapped
from pysteer.dream.features import Features
from pysteer.dream.parts import Parts, Share, digest_of
from pysteer.errors import InputError, PysteerError
from pysteer.steering.site import Site

ROLES = {"cond": ("cond",), "uncond": ("uncond",), "both": ("cond", "uncond")}
Advance = Callable[[float], object]


@dataclass(frozen=True)
class CapturePlan:
    """What is captured.

    Attributes:
        prompts, labels, seeds: of every row; the label is "" where there is none.
        numbers: of the prompt of every row, where a prompt has several images.
        rows: "cond", "uncond" or "both".
        top_k: features kept per row and step.
        block: rows of a block, generated as one batch.
        maps: whether the features that are kept are kept token by token too.
        images: whether images are made.
        settings: arguments of the pipeline.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    labels: Sequence[str] = ()
    numbers: Sequence[int] = ()
    rows: str = "cond"
    top_k: int = 64
    block: int = 32
    maps: bool = False
    images: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows not in ROLES:
            raise InputError("rows to capture", value=self.rows, allowed=", ".join(ROLES))
        if not self.prompts or len(self.prompts) != len(self.seeds):
            raise InputError("prompts and seeds", value=f"{len(self.prompts)}, {len(self.seeds)}", allowed="one each")
        if self.top_k < 1 or self.block < 1:
            value = f"{self.top_k}, {self.block}"
            raise InputError("top_k and block of the capture", value=value, allowed="whole numbers above 0")

    def describe(self) -> dict[str, Any]:
        """Plain values that say what is captured."""
        texts = digest_of([list(self.prompts), list(self.seeds), list(self.labels)])
        given = {name: getattr(self, name) for name in ("rows", "top_k", "block", "maps", "images", "settings")}
        return {"prompts": len(self.prompts), "texts": texts, **given}

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-len(self.prompts) // self.block)


def png_bytes(image: Tensor) -> bytes:
    """An image uint8 `[H, W, 3]` as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(buffer, format="png")
    return buffer.getvalue()


class _Block:
    """Collects what the taps see of one block."""

    def __init__(self, plan: CapturePlan, features: Sequence[Features], rows: int) -> None:
        self.plan, self.features, self.rows = plan, features, rows
        self.found: dict[tuple[str, str, str], dict[int, Tensor]] = {}

    def see(self, step: int, x: Tensor, rows: PartRows) -> None:
        """Take in the activation of a site at a step."""
        for role in ROLES[self.plan.rows]:
            part = x[rows.cond_rows if role == "cond" else rows.uncond_rows]
            if not len(part):
                continue
            if len(part) != self.rows:
                raise PysteerError(
                    f"{len(part)} {role} rows for {self.rows} prompts; fix: settings with one image per prompt"
                )
            for features in self.features:
                self._add(features, role, step, part)

    def _add(self, features: Features, role: str, step: int, x: Tensor) -> None:
        if step in self.found.get((features.kind, role, "values"), {}):
            return  # a solver that runs twice in a step: the first run is the one at its timestep
        means = features.means(x)
        k = min(self.plan.top_k, features.count)
        values, indices = means.topk(k, dim=1)
        kept = {"values": values, "indices": indices.int(), "sum": means.double().sum(0).float(), "max": means.amax(0)}
        kept |= {"min": means.amin(0), "active": (means > 0).sum(0)}
        if self.plan.maps:
            kept["maps"] = features.maps(x, indices)
        for name, tensor in kept.items():
            self.found.setdefault((features.kind, role, name), {})[step] = tensor.cpu()

    def tensors(self) -> dict[str, Tensor]:
        """All that was seen, steps stacked."""
        stacked = {}
        for (kind, role, name), by_step in self.found.items():
            per_row = name in ("values", "indices", "maps")
            parts = [by_step[step] for step in sorted(by_step)]
            stacked[f"{kind}.{role}.{name}"] = torch.stack(parts, dim=1 if per_row else 0)
        return stacked

    def steps(self) -> list[int]:
        """Steps that were seen."""
        return sorted({step for by_step in self.found.values() for step in by_step})


def capture_features(
    pipe: Any,
    plan: CapturePlan,
    features: Sequence[Features],
    folder: Path,
    *,
    share: Share | None = None,
    advance: Advance | None = None,
) -> Parts:
    """Run all prompts and write the blocks; blocks that are there are skipped.

    Args:
        pipe: an `ImageGenerator`.
        plan: what to capture.
        features: of one site, raw and those of an autoencoder; they read the same run.
        folder: where the blocks go.
        share: which blocks this process does.
        advance: told the number of rows after every block.

    Raises:
        InputError: features of several sites, or another capture in the folder.
    """
    sites = {f.site.name for f in features}
    if len(sites) != 1 or len({f.kind for f in features}) != len(features):
        raise InputError("features to capture", value=sorted(sites), allowed="raw and sae of one site")
    identity = {**plan.describe(), "features": {f.kind: f.digest() for f in features}}
    site = features[0].site
    parts = Parts(folder, {**identity, "site": site.name, "model": fingerprint(pipe, [site])}, plan.blocks)
    for number in parts.left(share):
        first = number * plan.block
        rows = range(first, min(first + plan.block, len(plan.prompts)))
        _capture_block(pipe, plan, features, site, parts, number, rows)
        if advance is not None:
            advance(len(rows))
    return parts


def _capture_block(
    pipe: Any, plan: CapturePlan, features: Sequence[Features], site: Site, parts: Parts, number: int, rows: range
) -> None:
    block = _Block(plan, features, len(rows))

    def see(_: Site, step: int, x: Tensor, part_rows: PartRows) -> Tensor:
        block.see(step, x.detach(), part_rows)
        return x

    prompts, seeds = [plan.prompts[i] for i in rows], [plan.seeds[i] for i in rows]
    with torch.no_grad(), tapped(pipe, [site], see):
        made = pipe(prompts, seeds=seeds, decode=plan.images, **plan.settings)
    tensors = block.tensors()
    if not tensors:
        raise PysteerError(f"site {site.name} never ran with {plan.rows} rows; fix: choose other rows or another site")
    times = getattr(getattr(pipe, "pipe", pipe).scheduler, "timesteps", torch.arange(max(block.steps()) + 1))
    tensors["timesteps"] = torch.unique_consecutive(torch.as_tensor(times).float().cpu())[block.steps()]
    table = [
        {
            "row": row,
            "prompt": plan.numbers[row] if plan.numbers else row,
            "text": plan.prompts[row],
            "label": plan.labels[row] if plan.labels else "",
            "seed": plan.seeds[row],
            "png": png_bytes(made.images[i]) if plan.images else b"",
        }
        for i, row in enumerate(rows)
    ]
    parts.add(
        [number],
        {
            "safetensors": lambda path: files.write_safetensors(path, tensors),
            "parquet": lambda path: files.write_parquet(path, table),
        },
    )


@dataclass(frozen=True)
class Block:
    """One block, read back: its rows, and its tensors by name without kind and role."""

    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    timesteps: Tensor


def read_blocks(parts: Parts, kind: str, role: str, columns: Sequence[str] = ("row",)) -> Iterator[Block]:
    """The blocks one after the other, in the order of their rows.

    Args:
        parts: what `capture_features` wrote.
        kind: "raw" or "sae".
        role: "cond" or "uncond".
        columns: of the table of rows that are read.

    Raises:
        InputError: the kind or the role was not captured.
    """
    import pyarrow.parquet as pq
    from safetensors import safe_open

    for part in sorted(parts, key=lambda part: part.items):
        rows = pq.read_table(part.files["parquet"], columns=list(columns)).to_pylist()
        prefix = f"{kind}.{role}."
        with safe_open(part.files["safetensors"], framework="pt") as stream:
            names = [name for name in stream.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a mapping)
            if not names:
                raise InputError(
                    "captured features", value=f"{kind} {role}", fix="capture them, with this kind and rows"
                )
            tensors = {name.removeprefix(prefix): stream.get_tensor(name) for name in names}
            times = stream.get_tensor("timesteps")
        yield Block(rows, tensors, times)
