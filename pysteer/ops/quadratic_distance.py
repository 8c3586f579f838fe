"""`quadratic_distance`: squared Mahalanobis distances d²(x, m_k) = (x - m_k)'P(x - m_k) of every token to K centres.

P is the identity, a dense matrix, or c (I - Z'Z), which is exactly what a Bayes (ridge) precision is: 2 D r operations
a token instead of 2 D². One (Z, c) may serve all centres, or every centre has its own.

Distances are taken relative to the mean of the centres, which changes nothing but the rounding: activations often share
a large common part, and the expansion of the square would lose the difference in it.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation
from pysteer.ops.declare import declare, plain_torch_needed
from pysteer.ops.launch import Launch, addresses, choose, on_device, packed
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import full_precision
from pysteer.ops.registry import Case, OpSpec, activation

_SCHEMA = "(Tensor x, Tensor centre, Tensor? factor, Tensor? scale, Tensor? precision, int channel_dim) -> Tensor"
_MANY, _FEW = 256, 96  # tokens that are worth turning the vectors over for, and how many of these
_CHUNK = 1 << 19  # numbers of what lies between, on a CPU: it should stay in the cache


def _applied(v: Tensor, factor: Tensor | None, precision: Tensor | None) -> Tensor:
    """Return P v / c for the vectors `v` [n, D], or [K, D] of centres that each have a factor [K, r, D]."""
    if precision is not None:
        return v @ precision
    if factor is None or factor.numel() == 0:
        return v
    if factor.dim() == 3:
        return v - torch.bmm(torch.bmm(v.unsqueeze(1), factor.mT), factor).squeeze(1)
    return v - (v @ factor.T) @ factor


def _own_squares(tokens: Tensor, factor: Tensor | None, precision: Tensor | None) -> Tensor:
    """Return x'Px / c of `tokens` [n, D] as [n, 1], or [n, K] where every centre has its factor."""
    if precision is not None:
        return ((tokens @ precision) * tokens).sum(-1, keepdim=True)
    own = tokens.square().sum(-1, keepdim=True)
    if factor is None or factor.numel() == 0:
        return own
    along_factor = tokens @ factor.flatten(0, -2).T
    return own - along_factor.square().unflatten(-1, factor.shape[:-1]).sum(-1, keepdim=factor.dim() == 2)


def quadratic_distance_reference(
    x: Tensor,
    centre: Tensor,
    factor: Tensor | None = None,
    scale: Tensor | None = None,
    precision: Tensor | None = None,
    *,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `quadratic_distance` computes, in plain torch; fp64 `x` is computed in fp64."""
    high = torch.promote_types(x.dtype, torch.float32)
    banks = (centre, factor, scale, precision)
    m, z, c, p = (None if bank is None else bank.to(high) for bank in banks)
    assert m is not None
    middle = m.mean(0)
    m = m - middle
    moved = x.movedim(channel_dim, -1)
    tokens = moved.reshape(moved.shape[:-1].numel(), moved.shape[-1]).to(high) - middle
    with full_precision(x):
        w = _applied(m, z, p)
        # x'Px - 2 x'Pm + m'Pm, the last two in one product
        squares = torch.addmm((m * w).sum(-1), tokens, w.T, alpha=-2) + _own_squares(tokens, z, p)
    squares = (squares if c is None else squares * c).clamp_min(0)
    return squares.reshape(*moved.shape[:-1], len(m))


def _pieces(moved: Tensor, size: int) -> list[Tensor]:
    """The tokens of `moved` [R, *tokens, D] as views [n, D] of at most `size` tokens, in order."""
    rows = [moved] if moved.is_contiguous() or moved.dim() == 2 else list(moved)
    return [piece for each in rows for piece in each.reshape(-1, each.shape[-1]).split(size)]


def _joined(w: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices: the vectors that tokens are multiplied with, and what turns (x'w, (Zx)²) into -2 x'w - |Zx|²."""
    count = len(w)
    owners = torch.eye(count, device=w.device)
    owners = owners.repeat_interleave(factor.shape[1], 0) if factor.dim() == 3 else w.new_ones(len(factor), count)
    return torch.cat((w, factor.flatten(0, -2))).T, torch.cat((w.new_full((count,), -2.0).diag(), -owners))


def _compiled_pieces(
    moved: Tensor, centre: Tensor, factor: Tensor | None, scale: Tensor | None, precision: Tensor | None
) -> Tensor:
    """The C++ passes around torch's matrix product; `moved` [R, *tokens, D] has its channels side by side."""
    extension, threads = backends.extension(), torch.get_num_threads()
    (count, width), own = centre.shape, factor is not None and factor.dim() == 3
    rank = 0 if factor is None else factor.shape[-2]
    middle, offset = torch.empty(width), torch.empty(count)
    vectors = torch.empty(count * (rank + 1) if own else count + rank, width)
    z = None if factor is None else factor.contiguous()
    given = addresses(centre.contiguous(), z, middle, vectors, offset)
    extension.quadratic_distance_centres(*given, count, rank, width, own)
    if precision is not None:  # so far P was the identity
        centred = vectors
        vectors = centred @ precision
        offset = (centred * vectors).sum(-1)
    c = None if scale is None else scale.contiguous()
    out = torch.empty((moved.shape[:-1].numel(), count), dtype=torch.float32)
    # Measured: a product with few columns takes a sixth less time when these lie side by side.
    turned = len(out) >= _MANY and len(vectors) <= _FEW
    weights = vectors.T.contiguous() if turned else vectors.T
    size = min(max(2 * _CHUNK // max(width, len(vectors), 1), 1), len(out))  # measured: twice what suits torch
    tokens, products = torch.empty((size, width)), torch.empty((size, len(vectors)))
    dense = None if precision is None else torch.empty((size, width))
    squares, start = torch.empty(size), 0
    for piece in _pieces(moved, size):
        n, code = len(piece), DTYPE_CODES[piece.dtype]
        extension.quadratic_distance_tokens(
            *addresses(piece, middle, tokens, squares), n, width, piece.stride(0), code, threads
        )
        torch.mm(tokens[:n], weights, out=products[:n])
        if dense is not None and precision is not None:
            torch.mm(tokens[:n], precision, out=dense[:n])
            extension.quadratic_distance_squares(*addresses(tokens, dense, squares), n, width, threads)
        given = addresses(products, squares, offset, c, out[start : start + n])
        extension.quadratic_distance(*given, n, count, rank, own, c is not None and c.numel() > 1, threads)
        start += n
    return out


def _plain_pieces(
    moved: Tensor, centre: Tensor, factor: Tensor | None, scale: Tensor | None, precision: Tensor | None
) -> Tensor:
    """The same in torch."""
    middle = centre.mean(0)
    m = centre - middle
    w = _applied(m, factor, precision)
    offset = (m * w).sum(-1)
    width, count = moved.shape[-1], len(w)
    vectors, sums = (w.T, None) if factor is None else _joined(w, factor)
    out = torch.empty((moved.shape[:-1].numel(), count), dtype=torch.float32)
    size = max(_CHUNK // max(width, vectors.shape[1], 1), 1)
    buffer, start = torch.empty((min(size, len(out)), width)), 0
    for piece in _pieces(moved, size):
        tokens = torch.sub(piece, middle, out=buffer[: len(piece)])
        squares = out[start : start + len(piece)]
        start += len(piece)
        if sums is None:
            torch.addmm(offset, tokens, vectors, alpha=-2, out=squares)
        else:
            products = torch.mm(tokens, vectors)
            products[:, count:].square_()
            torch.addmm(offset, products, sums, out=squares)
        if precision is None:
            squares += torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).square_()
        else:
            squares += torch.mm(tokens, precision).mul_(tokens).sum(-1, keepdim=True)
    if scale is not None:
        out *= scale
    return out.clamp_min_(0)


def _in_pieces(
    x: Tensor,
    centre: Tensor,
    factor: Tensor | None,
    scale: Tensor | None,
    precision: Tensor | None,
    channel_dim: int,
    compiled: bool,
) -> Tensor:
    """The same as the reference, a piece of the tokens at a time: what lies between stays in the cache."""
    moved = x.movedim(channel_dim, -1)
    factor = None if factor is None or factor.numel() == 0 else factor
    with full_precision(x):
        if compiled:
            out = _compiled_pieces(moved, centre, factor, scale, precision)
        else:
            out = _plain_pieces(moved, centre, factor, scale, precision)
    return out.reshape(*moved.shape[:-1], len(centre))


def _choose(x: Tensor, factor: Tensor | None, channel_dim: int) -> Launch:
    factors = factor is not None and factor.numel() > 0

    def serves(name: str) -> bool:
        return factors if name == "triton" else x.stride(channel_dim) == 1

    return choose("quadratic_distance", x, x, channel_dim, serves)


def _launched(
    x: Tensor, centre: Tensor, factor: Tensor, scale: Tensor | None, channel_dim: int, launch: Launch
) -> Tensor:
    """The Triton kernel; -2 times x'Pm - m'Pm/2 - x'Px/2, as `prototype_shift` has it."""
    middle = centre.mean(0)
    m = centre - middle
    with full_precision(x):
        w = _applied(m, factor, None)
    c = x.new_ones(1, dtype=torch.float32) if scale is None else scale.reshape(-1)
    w = w * c[:, None]
    offset = (m * w).sum(-1) * -0.5
    shape = x.movedim(channel_dim, -1).shape[:-1]
    out = torch.empty((*shape, len(centre)), dtype=torch.float32, device=x.device)
    with on_device(x):
        backends.load_kernels("quadratic_distance").launch(out, x, middle, *packed(w, offset, factor, c), launch.source)
    return out


def _forward(
    x: Tensor,
    centre: Tensor,
    factor: Tensor | None,
    scale: Tensor | None,
    precision: Tensor | None,
    channel_dim: int,
) -> Tensor:
    launch = _choose(x, factor, channel_dim)
    if launch.backend == "triton":
        assert factor is not None
        return _launched(x, centre, factor, scale, channel_dim, launch)
    if x.device.type != "cpu" or x.dtype is torch.float64 or x.numel() == 0:
        return quadratic_distance_reference(x, centre, factor, scale, precision, channel_dim=channel_dim)
    return _in_pieces(x, centre, factor, scale, precision, channel_dim, launch.backend == "cpu")


def _fake(x: Tensor, centre: Tensor, factor: Any, scale: Any, precision: Any, channel_dim: int) -> Tensor:
    shape = x.movedim(channel_dim, -1).shape[:-1]
    return x.new_empty((*shape, centre.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.channel_dim = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # d/dx sum_k g_k d²_k = 2 sum_k g_k P_k (x - m_k)
    x, *banks = ctx.saved_tensors
    high = gradient.dtype
    m, z, c, p = (None if bank is None else bank.to(high) for bank in banks)
    moved = x.movedim(ctx.channel_dim, -1)
    tokens = moved.reshape(-1, moved.shape[-1]).to(high)
    g = 2 * gradient.reshape(-1, gradient.shape[-1])
    g = g if c is None else g * c
    with full_precision(x):
        assert m is not None
        total = g.sum(-1, keepdim=True) * tokens - g @ m
        if z is None or z.dim() == 2:
            total = _applied(total, z, None if p is None else (p + p.T) / 2)
        else:
            every = z.flatten(0, 1)
            own = torch.bmm(z, m.unsqueeze(2)).flatten()  # Z_k m_k
            total = total - ((tokens @ every.T - own) * g.repeat_interleave(z.shape[1], -1)) @ every
    result = torch.empty_like(x).copy_(total.reshape(moved.shape).movedim(-1, ctx.channel_dim))
    return (result, *[None] * 5)


_plain, _differentiable = declare(
    "quadratic_distance", _SCHEMA, _forward, fake=_fake, setup_context=_setup_context, backward=_backward
)


def _check(x: Tensor, name: str, bank: Tensor, *shapes: tuple[int, ...]) -> None:
    if bank.dtype is not torch.float32 or bank.device != x.device or tuple(bank.shape) not in shapes:
        got = f"{str(bank.dtype).removeprefix('torch.')} {list(bank.shape)} on {bank.device}"
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(name, value=got, allowed=f"float32 {allowed} on {x.device}")


def _check_banks(
    x: Tensor, width: int, centre: Tensor, factor: Tensor | None, scale: Tensor | None, precision: Tensor | None
) -> None:
    count = centre.shape[0] if centre.dim() == 2 else 1
    _check(x, "centre", centre, (max(count, 1), width))
    rank = factor.shape[-2] if factor is not None and factor.dim() > 1 else 0
    if factor is not None:
        _check(x, "factor", factor, (rank, width), (count, rank, width))
    if scale is not None:
        own = factor is not None and factor.dim() == 3
        _check(x, "scale", scale, (count,) if own else (1,), *([] if own else [(count,)]))
    if precision is not None:
        _check(x, "precision", precision, (width, width))
        if factor is not None:
            raise InputError("precision", value="given with factor", allowed="one of precision and factor")


def quadratic_distance(
    x: Tensor,
    centre: Tensor,
    factor: Tensor | None = None,
    scale: Tensor | None = None,
    precision: Tensor | None = None,
    *,
    channel_dim: int = -1,
) -> Tensor:
    """Return d²_k = (x - m_k)' P (x - m_k) of every token to every centre, in fp32.

    P = c (I - Z'Z) with Z = `factor` and c = `scale`, the exact form of a Bayes precision (`BayesPrecision.low_rank`);
    with `precision`, P is that matrix times c; with neither, c times the identity. Nothing is below 0. bf16 and fp16
    activations are computed in fp32 from their exact values. Differentiable in everything; in `x` by a formula.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        centre: [K, D] fp32, m.
        factor: [r, D] fp32, or [K, r, D] where every centre has its own.
        scale: [1] or [K] fp32; 1 when left out.
        precision: [D, D] fp32, symmetric.
        channel_dim: where the channels are, -1 or 1.

    Returns:
        [R, K] or [R, *tokens, K] fp32 (fp64 for fp64).

    Raises:
        InputError: a shape, dtype or device does not fit, or `factor` and `precision` are both given.
    """
    width = check_activation(x, channel_dim, None)
    _check_banks(x, width, centre, factor, scale, precision)
    banks = [bank for bank in (centre, factor, scale, precision) if bank is not None]
    # In a graph for a CPU the matrix products are the compiler's to surround; a kernel stays a kernel.
    compiled = torch.compiler.is_compiling() and (x.device.type == "cpu" or precision is not None or factor is None)
    if compiled or plain_torch_needed(*banks):
        return quadratic_distance_reference(x, centre, factor, scale, precision, channel_dim=channel_dim)
    operator = _differentiable if x.requires_grad and torch.is_grad_enabled() else _plain
    return operator(x, centre, factor, scale, precision, channel_dim)


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    count, rank = case.sizes.get("centres", 5), case.sizes.get("rank", 3)
    options = dict(case.options)
    kind = options.pop("kind", "low-rank")
    banks: dict[str, Tensor] = {"centre": torch.randn(count, case.width, generator=generator)}
    if kind == "low-rank":
        directions = torch.randn(rank, case.width, generator=generator)
        banks["factor"] = directions * (0.7 / directions.norm(dim=-1, keepdim=True) / rank**0.5)
    if kind == "per-cluster":
        directions = torch.randn(count, rank, case.width, generator=generator)
        banks["factor"] = directions * (0.7 / directions.norm(dim=-1, keepdim=True) / rank**0.5)
    if kind == "dense":
        root = torch.randn(case.width, case.width, generator=generator) / case.width**0.5
        banks["precision"] = root @ root.T + 0.1 * torch.eye(case.width)
    banks["scale"] = torch.rand(count if kind == "per-cluster" else 1, generator=generator) + 0.5
    given: dict[str, Any] = {"factor": None, "precision": None}
    given |= {name: bank.to(case.device) for name, bank in banks.items()}
    return {"x": x, **given, "channel_dim": channel_dim, **options}


def _implementation(x: Tensor, factor: Tensor | None = None, channel_dim: int = -1, **_: Any) -> str:
    return _choose(x, factor, channel_dim).backend


SPEC = OpSpec(
    name="quadratic_distance",
    function=quadratic_distance,
    reference=quadratic_distance_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={
        "cpu": "what surrounds the matrix products, for channels side by side",
        "triton": "a factor, shared or per centre; the matrix products of the rest are torch's",
    },
    variants={
        "low-rank": {},
        "per-cluster": {"kind": "per-cluster"},
        "dense": {"kind": "dense"},
        "euclid": {"kind": "euclid"},
    },
    sizes=({"centres": 5}, {"centres": 1, "rank": 17}, {"centres": 40, "rank": 2}),
    gradients=("x",),
    defaults={"factor": None, "scale": None, "precision": None},
)
