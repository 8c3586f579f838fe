"""`gram_accumulate`: count, mean and scatter matrix of a stream of activations; `row_gram` for rows that are long.

The matrix products are the library's; around them stand the shift to the mean of each block, so that nothing cancels,
the sum of fp32 blocks in fp64, and only one half of a symmetric result where the other half costs anything.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops.checks import check_activation
from pysteer.ops.declare import declare, has_memory, plain_torch_needed
from pysteer.ops.lookup import full_precision
from pysteer.ops.registry import Case, OpSpec, activation

_SCHEMA = "(Tensor x, int channel_dim) -> (Tensor, Tensor, Tensor)"
_TOKENS = 4096  # of a block
_PANEL = 128  # channels of a panel, and more where 8 panels are not enough; thinner ones save no more of the product


class Gram(NamedTuple):
    """Statistics of n vectors of D values; all fp64.

    Attributes:
        number: [1], n; a compiled graph would not write to a tensor [].
        mean: [D].
        scatter: [D, D], the sum of (x - mean)(x - mean)'.
    """

    number: Tensor
    mean: Tensor
    scatter: Tensor

    def covariance(self, correction: int = 1) -> Tensor:
        """`scatter / (n - correction)`."""
        return self.scatter / (self.number - correction)

    def second_moment(self) -> Tensor:
        """The sum of x x', not divided."""
        return torch.addr(self.scatter, self.mean * self.number, self.mean)


def empty_gram(width: int, device: torch.device | str = "cpu") -> Gram:
    """Return the statistics of no vectors of `width` values: what an accumulator starts from."""
    sizes: tuple[tuple[int, ...], ...] = ((1,), (width,), (width, width))
    return Gram(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))


def merge_grams(a: Gram, b: Gram) -> Gram:
    """Return the statistics of the vectors of `a` and `b` together (Chan, Golub and LeVeque 1979)."""
    number = a.number + b.number
    share = b.number / number.clamp_min(1)
    away = b.mean - a.mean
    scatter = torch.addr(a.scatter + b.scatter, away * (a.number * share), away)
    return Gram(number, a.mean + away * share, scatter)


def gram_accumulate_reference(x: Tensor, *, channel_dim: int = -1, into: Gram | None = None) -> Gram:
    """Return what `gram_accumulate` computes, in plain torch; fp64 `x` is computed in fp64."""
    vectors = x.movedim(channel_dim, -1).flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
    number = torch.full((1,), len(vectors), dtype=torch.float64, device=x.device)
    mean = vectors.sum(0, dtype=torch.float64) / max(len(vectors), 1)
    away = vectors - mean.to(vectors.dtype)
    with full_precision(x):
        found = Gram(number, mean, (away.T @ away).double())
    if into is None:
        return found
    for target, value in zip(into, merge_grams(into, found), strict=True):
        target.copy_(value)
    return into


def _blocks(x: Tensor, channel_dim: int) -> Iterator[Tensor]:
    """Pieces [n, D] of the vectors of `x`, of bounded size."""
    if x.dim() == 2:
        tokens = x.unsqueeze(0)
    elif channel_dim == 1:
        tokens = x.flatten(2).transpose(1, 2)
    else:
        tokens = x.flatten(1, -2)
    rows, length, width = tokens.shape
    together = max(1, _TOKENS // max(length, 1))
    for row in range(0, rows if tokens.numel() else 0, together):
        for token in range(0, length, _TOKENS):
            yield tokens[row : row + together, token : token + _TOKENS].reshape(-1, width)


def _add_products(scatter: Tensor, vectors: Tensor) -> None:
    """Add vectors' vectors to the blocks of `scatter` on and above the diagonal."""
    width = vectors.shape[1]
    panel = -(-width // max(1, min(width // _PANEL, 8)))
    for first in range(0, width, panel):
        scatter[first : first + panel, first:] += vectors[:, first : first + panel].T @ vectors[:, first:]


def _mirror(scatter: Tensor) -> None:
    """Copy what is above the diagonal to below it."""
    width = len(scatter)
    panel = -(-width // max(1, min(width // _PANEL, 8)))
    for first in range(0, width, panel):
        end = first + panel
        scatter[end:, first:end] = scatter[first:end, end:].T


def _accumulate(x: Tensor, channel_dim: int, into: Gram) -> Gram:
    number, mean, scatter = into
    with full_precision(x):
        for block in _blocks(x, channel_dim):
            vectors = block.to(torch.promote_types(x.dtype, torch.float32))
            found = vectors.sum(0, dtype=torch.float64) / len(vectors)
            share = len(vectors) / (number + len(vectors))
            away = found - mean
            _add_products(scatter, vectors - found.to(vectors.dtype))
            scatter.addr_(away * (number * share), away)
            mean += away * share
            number += len(vectors)
    _mirror(scatter)
    return into


def _forward(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return _accumulate(x.detach(), channel_dim, empty_gram(x.shape[channel_dim], x.device))


def _fake(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[channel_dim]
    number, mean, scatter = (x.new_empty(size, dtype=torch.float64) for size in ((1,), (width,), (width, width)))
    return number, mean, scatter


_plain, _ = declare("gram_accumulate", _SCHEMA, _forward, fake=_fake)


def gram_accumulate(x: Tensor, *, channel_dim: int = -1, into: Gram | None = None) -> Gram:
    """Return number, mean and scatter matrix of all tokens of an activation, or add them to earlier ones.

    Blocks of some thousand tokens are shifted to their mean and multiplied in fp32, then added up in fp64: values of
    10^4 +- 1 keep their covariance. Beyond `into` and one block the memory is that of one product [D, D] in fp32. The
    products are those of torch, and as reproducible. There is no gradient.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16, fp16 or fp64.
        channel_dim: where the channels are, -1 or 1.
        into: earlier statistics to add to, in place, without waiting for the device; start it with `empty_gram`.

    Returns:
        Fresh statistics, or `into`.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    width = check_activation(x, channel_dim, None)
    if into is not None:
        sizes: tuple[tuple[int, ...], ...] = ((1,), (width,), (width, width))
        for name, tensor, size in zip(Gram._fields, into, sizes, strict=True):
            if tensor.shape != size or tensor.dtype != torch.float64 or tensor.device != x.device:
                found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                allowed = f"torch.float64 {list(size)} on {x.device}"
                raise InputError(f"{name} of into", value=found, allowed=allowed, fix="empty_gram")
    x = x.detach()
    if plain_torch_needed():
        return gram_accumulate_reference(x, channel_dim=channel_dim, into=into)
    if into is None:
        return Gram(*_plain(x, channel_dim))
    if not torch.compiler.is_compiling() and has_memory(x):
        return _accumulate(x, channel_dim, into)
    for target, value in zip(into, merge_grams(into, Gram(*_plain(x, channel_dim))), strict=True):
        target.copy_(value)
    return into


def row_gram(x: Tensor, *, into: Tensor | None = None, centre: bool = True, standardise: bool = False) -> Tensor:
    """Return X X' [n, n] fp64 of rows that come in blocks of columns, or add a block to it.

    For principal components of few long vectors (n << d). All rows of a column are in its block, so that every column
    is centred exactly, before it is multiplied.

    Args:
        x: [n, d], a block of columns; fp32, bf16, fp16 or fp64.
        into: [n, n] fp64 to add to, in place.
        centre: subtract from every column its mean.
        standardise: also divide every column by its standard deviation (population); constant columns count as zero.

    Raises:
        InputError: a shape or dtype does not fit.
    """
    check_activation(x, -1, None)
    if x.dim() != 2:
        raise InputError("x", value=list(x.shape), allowed="[n, d], rows by a block of columns")
    if into is None:
        into = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    if into.shape != (len(x), len(x)) or into.dtype != torch.float64 or into.device != x.device:
        allowed = f"torch.float64 {[len(x), len(x)]} on {x.device}"
        raise InputError("into", value=f"{into.dtype} {list(into.shape)} on {into.device}", allowed=allowed)
    with full_precision(x):
        for block in x.detach().split(_TOKENS, 1):
            columns = block.to(torch.promote_types(x.dtype, torch.float32))
            if centre or standardise:
                columns = columns - columns.mean(0)
            if standardise:
                deviation = columns.square().mean(0).sqrt()
                columns = torch.where(deviation > 0, columns / deviation, 0.0)
            _add_products(into, columns.T)
    _mirror(into)
    return into


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    x = x + case.sizes.get("mean", 0)
    return {"x": x, "channel_dim": channel_dim, **case.options}


def _compare(result: Any, truth: Any, inputs: dict[str, Any], limit: Any) -> None:
    """Products of two channels are held against the lengths of both: sums of terms of either sign cancel."""
    length = truth[2].diagonal().double().sqrt()
    scales = (truth[0].double(), (length / truth[0].double().sqrt()).maximum(truth[1].double().abs()))
    for found, right, scale in zip(result, truth, (*scales, torch.outer(length, length)), strict=True):
        far = (found.double() - right.double()).abs() > limit.absolute + limit.relative * scale
        assert not far.any(), f"{int(far.sum())} of {far.numel()} elements are off"
        assert bool(found.isfinite().all())


SPEC = OpSpec(
    name="gram_accumulate",
    function=gram_accumulate,
    reference=gram_accumulate_reference,
    make_inputs=_make_inputs,
    implementation=lambda **_: "reference",
    backends={},
    variants={"plain": {}},
    sizes=({}, {"mean": 30}),
    compare=_compare,
)
