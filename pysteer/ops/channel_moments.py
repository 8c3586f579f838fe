"""`channel_moments`: eight statistics of every channel in one pass over an activation, and how two of them merge."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation
from pysteer.ops.declare import declare, has_memory, plain_torch_needed
from pysteer.ops.launch import Launch, choose, on_device
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.registry import Case, OpSpec, activation

_SCHEMA = "(Tensor x, float eps, int channel_dim) -> Tensor"
_EMPTY = (0.0, 0.0, 0.0, math.inf, -math.inf, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ChannelMoments:
    """The rows of a tensor of moments `[8, D]` by name; each is `[D]` fp64 and shares its memory.

    Attributes:
        count: number of values n.
        mean: their mean; 0 where n = 0.
        m2: sum of squared deviations from the mean.
        minimum, maximum: +inf and -inf where n = 0.
        mean_abs: mean of |x|.
        near_zero: number of values with |x| < eps.
        zero: number of values that are 0 or -0.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    minimum: Tensor
    maximum: Tensor
    mean_abs: Tensor
    near_zero: Tensor
    zero: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "ChannelMoments":
        """Name the rows of `moments` `[8, D]`."""
        return cls(*moments.unbind(0))

    def variance(self, correction: int = 1) -> Tensor:
        """`m2 / (n - correction)`, as `torch.var` has it; NaN where n <= correction."""
        free = self.count - correction
        return torch.where(free > 0, self.m2 / free.clamp_min(1), torch.nan)

    def std(self, correction: int = 1) -> Tensor:
        """The square root of `variance`."""
        return self.variance(correction).sqrt()

    def near_zero_fraction(self) -> Tensor:
        """Share of values with |x| < eps."""
        return self.near_zero / self.count

    def zero_fraction(self) -> Tensor:
        """Share of values that are 0."""
        return self.zero / self.count


def empty_moments(width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the moments of no values, `[8, width]` fp64: what an accumulator starts from."""
    return torch.tensor(_EMPTY, dtype=torch.float64, device=device).unsqueeze(1).repeat(1, width)


def merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """Return the moments `[8, D]` of the values of `a` and of `b` together (Chan, Golub and LeVeque 1979)."""
    one, two = ChannelMoments.of(a), ChannelMoments.of(b)
    count = one.count + two.count
    share_a, share_b = (each.count / count.clamp_min(1) for each in (one, two))
    m2 = one.m2 + two.m2 + (two.mean - one.mean).square() * one.count * share_b
    return torch.stack(
        [
            count,
            one.mean * share_a + two.mean * share_b,
            m2,
            torch.minimum(one.minimum, two.minimum),
            torch.maximum(one.maximum, two.maximum),
            one.mean_abs * share_a + two.mean_abs * share_b,
            one.near_zero + two.near_zero,
            one.zero + two.zero,
        ]
    )


def channel_moments_reference(
    x: Tensor, *, eps: float = 1e-6, channel_dim: int = -1, into: Tensor | None = None
) -> Tensor:
    """Return what `channel_moments` computes, in plain torch; fp64 `x` is computed in fp64."""
    values = x.movedim(channel_dim, 0).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    count = values.shape[1]
    if values.numel() == 0:
        moments = empty_moments(values.shape[0], x.device)
    else:
        mean = values.mean(1, dtype=torch.float64)
        away = values - mean.to(values.dtype).unsqueeze(1)
        m2 = away.square().sum(1, dtype=torch.float64) - away.sum(1, dtype=torch.float64).square() / count
        size = values.abs()
        rows = [
            torch.full_like(mean, count), mean, m2,
            values.amin(1), values.amax(1), size.mean(1, dtype=torch.float64),
            (size < eps).sum(1), (values == 0).sum(1),
        ]  # fmt: skip
        moments = torch.stack([row.double() for row in rows])
    return moments if into is None else into.copy_(merge_moments(into, moments))


def _choose(x: Tensor, channel_dim: int) -> Launch:
    return choose("channel_moments", x, x, channel_dim)


def _run(x: Tensor, eps: float, channel_dim: int, into: Tensor | None) -> Tensor:
    launch = _choose(x, channel_dim)
    if launch.backend == "reference":
        return channel_moments_reference(x, eps=eps, channel_dim=channel_dim, into=into)
    out = torch.empty(8, x.shape[channel_dim], dtype=torch.float64, device=x.device) if into is None else into
    if launch.backend == "triton":
        with on_device(x):
            backends.load_kernels("channel_moments").launch(out, x, eps, into is not None, launch.source)
        return out
    assert launch.source is not None
    backends.extension().channel_moments(
        x.data_ptr(), out.data_ptr(), *launch.source, eps, int(into is not None), DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _forward(x: Tensor, eps: float, channel_dim: int) -> Tensor:
    return _run(x, eps, channel_dim, None)


def _fake(x: Tensor, eps: float, channel_dim: int) -> Tensor:
    return x.new_empty(8, x.shape[channel_dim], dtype=torch.float64)


_plain, _ = declare("channel_moments", _SCHEMA, _forward, fake=_fake)


def channel_moments(x: Tensor, *, eps: float = 1e-6, channel_dim: int = -1, into: Tensor | None = None) -> Tensor:
    """Return count, mean, m2, minimum, maximum, mean |x|, near-zero count and zero count of every channel.

    One pass over `x`, with memory of O(D). Blocks are summed in fp32, in fp64 from there on; a block whose mean is far
    from zero is summed once more around its mean, so that the variance of values such as 10^4 +- 1 does not cancel. The
    blocks depend on the shape alone: the number of threads does not change a bit.

    A NaN makes mean, m2, minimum, maximum and mean_abs of its channel NaN; an infinity counts as itself, as in torch,
    and makes m2 NaN. All values are counted; NaN is neither near zero nor zero. There is no gradient.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        eps: what counts as near zero, |x| < eps, in fp32.
        channel_dim: where the channels are, -1 or 1.
        into: moments [8, D] fp64 to add these values to, in place, without waiting for the device; start it with
            `empty_moments`.

    Returns:
        Fresh moments [8, D] fp64, or `into`. `ChannelMoments.of` names the rows.

    Raises:
        InputError: a shape, dtype or device does not fit, or eps is negative.
    """
    width = check_activation(x, channel_dim, None)
    if not eps >= 0:
        raise InputError("eps", value=eps, allowed="0 or more")
    if into is not None and (into.shape != (8, width) or into.dtype != torch.float64 or into.device != x.device):
        found = f"{into.dtype} {list(into.shape)} on {into.device}"
        raise InputError("into", value=found, allowed=f"torch.float64 {[8, width]} on {x.device}", fix="empty_moments")
    if plain_torch_needed():
        return channel_moments_reference(x, eps=eps, channel_dim=channel_dim, into=into)
    x = x.detach()
    if into is None:
        return _plain(x, eps, channel_dim)
    if not torch.compiler.is_compiling() and has_memory(x) and into.is_contiguous():
        return _run(x, eps, channel_dim, into)
    return into.copy_(merge_moments(into, _plain(x, eps, channel_dim)))


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    dead = torch.arange(case.width, device=x.device) % 5 == 3  # some channels as after a ReLU
    dead = dead.reshape([-1 if dim == channel_dim % x.dim() else 1 for dim in range(x.dim())])
    shift = case.sizes.get("mean", 0)
    x = torch.where(dead, x.relu(), x + shift)
    return {"x": x, "eps": 1e-2, "channel_dim": channel_dim, **case.options}


def _implementation(x: Tensor, channel_dim: int = -1, **_: Any) -> str:
    return _choose(x, channel_dim).backend


_ALL = "fp32, bf16, fp16 in all layouts with channels or tokens next to each other"
SPEC = OpSpec(
    name="channel_moments",
    function=channel_moments,
    reference=channel_moments_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": _ALL},
    variants={"plain": {}},
    sizes=({}, {"mean": 100}),
)
