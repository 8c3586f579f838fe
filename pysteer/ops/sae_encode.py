"""`sae_encode`: the few latents of a sparse autoencoder that are active for each token.

Pre-activations are a = W (x - b_pre) + b. Kept are the k largest of each token (TopK), the k N largest of all tokens or
of a row of the batch (BatchTopK, SampleTopK), or those above a threshold (JumpReLU); the N x M pre-activations never
reach memory as a whole.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation
from pysteer.ops.declare import declare, plain_torch_needed
from pysteer.ops.latents import (
    check_latents,
    compare_selection,
    largest,
    pre_activations,
    random_latents,
    sparse_gradients,
)
from pysteer.ops.launch import Launch, addresses, choose, on_device
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.registry import Case, OpSpec, activation

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? pre_bias, int? k, str mode, Tensor? threshold, bool relu,"
    " int? capacity, int channel_dim) -> (Tensor, Tensor)"
)
_MODES = ("topk", "batch_topk", "sample_topk", "threshold")
_DEFAULT_CAPACITY = 4  # times k, where tokens share


def _capacity(latents: int, k: int | None, mode: str, capacity: int | None) -> int:
    """Return how many latents a token has room for."""
    if mode == "topk":
        assert k is not None
        return k
    if capacity is not None:
        return capacity
    assert k is not None
    return min(latents, _DEFAULT_CAPACITY * k)


def _keep_in_groups(values: Tensor, there: Tensor, k: int, rows: int) -> Tensor:
    """Return which of the values [N, C] are among the k n largest of their group of n tokens; ties to the first.

    Args:
        values: sorted along the last dimension, largest first.
        there: where there is a value at all.
        k: kept per token on average.
        rows: number of groups, each of N / rows tokens.
    """
    if not values.numel():
        return there
    flat = values.masked_fill(~there, -torch.inf).reshape(rows, -1)
    count = min(k * (values.shape[0] // rows), flat.shape[1])
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :count]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    return kept.reshape(values.shape) & there


def sae_encode_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    k: int | None = None,
    mode: str = "topk",
    threshold: Tensor | None = None,
    relu: bool = True,
    capacity: int | None = None,
    channel_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Return what `sae_encode` computes, in plain torch; fp64 `x` is computed in fp64."""
    room = _capacity(weight.shape[0], k, mode, capacity)
    a = pre_activations(x, weight, bias, pre_bias, channel_dim)
    fixed = a.detach()
    if threshold is not None:
        fixed = fixed.masked_fill(~(fixed > threshold.to(a.dtype)), -torch.inf)
    indices = largest(fixed, room)
    values = a.gather(-1, indices)
    there = torch.ones_like(indices, dtype=torch.bool)
    if threshold is not None:
        there = fixed.gather(-1, indices) > -torch.inf
    elif mode != "topk":
        assert k is not None
        flat = values.detach().reshape(-1, room)
        groups = 1 if mode == "batch_topk" else x.shape[0]
        there = _keep_in_groups(flat, there.reshape(-1, room), k, groups).reshape(values.shape)
    values = torch.where(there, values.relu() if relu else values, 0.0)
    return values.to(x.dtype), torch.where(there, indices, -1).to(torch.int32)


def _choose(x: Tensor, weight: Tensor, room: int, channel_dim: int) -> Launch:
    if weight.dtype not in DTYPE_CODES or not weight.numel():
        return Launch("reference")

    def serves(name: str) -> bool:
        return name == "cpu" or (name == "triton" and bool(backends.load_kernels("sae_encode").serves(weight, room)))

    return choose("sae_encode", x, x, channel_dim, serves)


def padded_floats(tensor: Tensor | None, size: int) -> Tensor:
    """Return a vector or scalar, zeros for None, as `size` fp32 elements with room for a vector of the CPU behind."""
    padded = torch.zeros(size + backends.extension().PANEL_ROOM)
    if tensor is not None:
        padded[:size] = tensor
    return padded


def encode_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, pre_bias: Tensor | None, k: int, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """Return what `sae_encode` does with k latents per token, with values in fp32."""
    return _encode(x, weight, bias, pre_bias, k, "topk", None, True, None, channel_dim, dtype=torch.float32)


def encode_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    threshold: Tensor | None,
    relu: bool,
    shared: tuple[int, int],
    out: tuple[Tensor, Tensor],
    launch: Launch,
) -> None:
    """Write values [N, C] (fp32, or as `x`) and indices [N, C] of the C largest latents of every token into `out`.

    With `shared` (k, n), what cannot be among the k n largest of n tokens may be left out.
    """
    module, latents = backends.extension(), weight.shape[0]
    assert launch.source is not None
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    vectors = (padded_floats(bias, latents), None if pre_bias is None else pre_bias.float().contiguous())
    limits = None if threshold is None else padded_floats(threshold, latents)
    codes = (DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], DTYPE_CODES[out[0].dtype])
    places = addresses(x, weight, *vectors, limits, *out)
    sizes = (*launch.source, latents, weight.stride(0), out[0].shape[-1], *shared)
    module.sae_encode(*places, *sizes, relu, *codes, torch.get_num_threads())


def _encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    k: int | None,
    mode: str,
    threshold: Tensor | None,
    relu: bool,
    capacity: int | None,
    channel_dim: int,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    room = _capacity(weight.shape[0], k, mode, capacity)
    launch = _choose(x, weight, room, channel_dim)
    if launch.backend == "reference":
        options = {"k": k, "mode": mode, "threshold": threshold, "relu": relu, "capacity": capacity}
        values, indices = sae_encode_reference(x, weight, bias, pre_bias, **options, channel_dim=channel_dim)  # type: ignore[arg-type]
        return values.to(dtype), indices
    shared = mode in ("batch_topk", "sample_topk")
    shape = _result_shape(x, room, channel_dim)
    values = torch.empty(shape, dtype=torch.float32 if shared else dtype, device=x.device)
    indices = torch.empty(shape, dtype=torch.int32, device=x.device)
    flat = values.view(-1, room), indices.view(-1, room)
    if launch.backend == "cpu":
        tokens = flat[0].shape[0]
        pool = (k or 0, tokens // (1 if mode == "batch_topk" else x.shape[0])) if shared else (0, 0)
        encode_on_cpu(x, weight, bias, pre_bias, threshold, relu and not shared, pool, flat, launch)
    else:
        with on_device(x):
            kernels = backends.load_kernels("sae_encode")
            kernels.launch(x, weight, bias, pre_bias, threshold, relu and not shared, flat, launch.source)
    if not shared:
        return values, indices
    assert k is not None
    groups = 1 if mode == "batch_topk" else x.shape[0]
    kept = _keep_in_groups(flat[0], flat[1] >= 0, k, groups).view(shape)
    indices.masked_fill_(~kept, -1)
    values = values.relu_() if relu else values
    return values.masked_fill_(~kept, 0.0).to(dtype), indices


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _encode(x, *arguments, dtype=x.dtype)


def _result_shape(x: Tensor, room: int, channel_dim: int) -> list[int]:
    shape = list(x.shape)
    shape.pop(channel_dim)
    return [*shape, room]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    k: int | None,
    mode: str,
    threshold: Tensor | None,
    relu: bool,
    capacity: int | None,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    shape = _result_shape(x, _capacity(weight.shape[0], k, mode, capacity), channel_dim)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, pre_bias, _, _, _, ctx.relu, _, ctx.channel_dim = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, pre_bias, *output)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, pre_bias, values, indices = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    if ctx.relu:
        gradient = torch.where(values > 0, gradient, torch.zeros_like(gradient))
    found = sparse_gradients(gradient, indices, x, weight, bias, pre_bias, list(wanted), ctx.channel_dim)
    return (*(each if asked else None for each, asked in zip(found, wanted, strict=True)), *[None] * 6)


_plain, _differentiable = declare(
    "sae_encode", _SCHEMA, _forward, fake=_fake, setup_context=_setup_context, backward=_backward
)


def check_choice(latents: int, k: int | None, mode: str, threshold: Tensor | None, capacity: int | None) -> None:
    if mode not in _MODES:
        raise InputError("mode", value=mode, allowed=", ".join(_MODES))
    if (mode == "threshold") != (threshold is not None):
        allowed = "a tensor, with mode='threshold'" if threshold is None else "None, unless mode='threshold'"
        raise InputError("threshold", value="None" if threshold is None else "a tensor", allowed=allowed)
    if mode == "threshold":
        if k is not None:
            raise InputError("k", value=k, allowed="None with mode='threshold'", fix="give capacity instead")
        if capacity is None:
            raise InputError("capacity", value=capacity, allowed=f"1 to {latents}, the most latents a token can have")
    elif k is None or not 1 <= k <= latents:
        raise InputError("k", value=k, allowed=f"1 to {latents}, the number of latents in weight")
    if mode == "topk" and capacity not in (None, k):
        raise InputError("capacity", value=capacity, allowed="None with mode='topk', where every token has k")
    lowest = k or 1
    if capacity is not None and not lowest <= capacity <= latents:
        raise InputError("capacity", value=capacity, allowed=f"{lowest} to {latents}")


def sae_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    k: int | None = None,
    mode: str = "topk",
    threshold: Tensor | None = None,
    relu: bool = True,
    capacity: int | None = None,
    channel_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Return the active latents of every token: their values and indices, largest first.

    a = weight (x - pre_bias) + bias, in fp32 whatever the dtypes are. Which are active:

    - "topk": the k largest of each token.
    - "batch_topk", "sample_topk": the k n largest of all n tokens, or of the n tokens of each row; no token gets more
      than `capacity`, the rest goes to other tokens.
    - "threshold" (JumpReLU): those with a > threshold; of more than `capacity` the largest.

    ReLU is applied after the selection. Among equals the lowest index wins, then the first token; NaN counts as
    largest. A token's result depends on that token alone (except in the modes where tokens share), not on the batch or
    the number of threads. Differentiable in x, weight, bias and pre_bias through the selected latents. Memory beyond
    the result is O(N capacity) plus tiles.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        weight: [M, D], the encoder; fp32, bf16 or fp16, not necessarily as `x`. Copied where the channels of a latent
            are not next to each other.
        bias: [M] or None, of a floating dtype, as the following.
        pre_bias: [D] or None; subtracted from `x`, usually the bias of the decoder.
        k: latents per token (on average, where tokens share); 1 to M.
        mode: "topk", "batch_topk", "sample_topk" or "threshold".
        threshold: [] or [M].
        relu: whether values below 0 become 0.
        capacity: C, the most latents of a token: k for "topk", by default min(M, 4 k) where tokens share, and to be
            given for "threshold". A token whose last index is not -1 may have had more.
        channel_dim: where the channels are, -1 or 1.

    Returns:
        values [R, *tokens, C] like `x` and indices [R, *tokens, C] int32, contiguous. Tokens with fewer latents than C
        end in value 0 and index -1. `sae_decode` takes both as they are.

    Raises:
        InputError: a shape, dtype, device or option does not fit.
    """
    width = check_activation(x, channel_dim, None)
    latents = check_latents(x, width, weight, bias=bias, pre_bias=pre_bias, threshold=threshold)
    check_choice(latents, k, mode, threshold, capacity)
    if plain_torch_needed():
        options = {"k": k, "mode": mode, "threshold": threshold, "relu": relu, "capacity": capacity}
        return sae_encode_reference(x, weight, bias, pre_bias, **options, channel_dim=channel_dim)  # type: ignore[arg-type]
    leaves = (x, weight, bias, pre_bias)
    wants_grad = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in leaves)
    call = _differentiable if wants_grad else _plain
    return call(*leaves, k, mode, threshold, relu, capacity, channel_dim)


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    tensors = random_latents(case, x)
    options = {"mode": "topk", **case.options}
    if options["mode"] == "threshold":
        generator = torch.Generator().manual_seed(case.seed + 3)
        threshold = 1.0 + 0.5 * torch.rand(tensors["weight"].shape[0], generator=generator)
        options["threshold"] = threshold.to(case.device)
    else:
        options["k"] = case.sizes.get("k", 4)
    return {"x": x, **tensors, **options, "channel_dim": channel_dim}


def _implementation(
    x: Tensor,
    weight: Tensor,
    k: int | None = None,
    mode: str = "topk",
    capacity: int | None = None,
    channel_dim: int = -1,
    **_: Any,
) -> str:
    return _choose(x, weight, _capacity(weight.shape[0], k, mode, capacity), channel_dim).backend


_ALL = "fp32, bf16, fp16 activations and weights; channels or tokens next to each other"
SPEC = OpSpec(
    name="sae_encode",
    function=sae_encode,
    reference=sae_encode_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": f"{_ALL}; up to 128 latents of a token, of 262144"},
    variants={
        "topk": {},
        "batch": {"mode": "batch_topk"},
        "sample-signed": {"mode": "sample_topk", "capacity": 35, "relu": False},
        "threshold": {"mode": "threshold", "capacity": 20},
    },
    sizes=({"latents": 260, "k": 4}, {"latents": 49, "k": 33}),
    gradients=("x", "weight", "bias", "pre_bias"),
    defaults={"k": None, "threshold": None, "relu": True, "capacity": None},
    wide=("x", "weight", "bias", "pre_bias"),
    compare=compare_selection,
)
