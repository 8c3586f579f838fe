"""`sae_encode_mean`: how active every latent of a sparse autoencoder is on average over the tokens of a row.

mean_l f(W (x_l - b_pre) + b) with f ReLU, JumpReLU or the k largest of the token; the capture of diffusion steps needs
no more than this, and N x M activations never reach memory.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation
from pysteer.ops.declare import declare, plain_torch_needed
from pysteer.ops.latents import check_latents, pre_activations, random_latents
from pysteer.ops.launch import Launch, addresses, choose, on_device
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.registry import Case, OpSpec, activation
from pysteer.ops.sae_encode import check_choice, encode_topk, padded_floats, sae_encode_reference

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? pre_bias, Tensor? threshold, int? k, int channel_dim) -> Tensor"
)


def sae_encode_mean_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    k: int | None = None,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `sae_encode_mean` computes, in plain torch; fp64 `x` is computed in fp64."""
    if k is not None:
        high = torch.promote_types(x.dtype, torch.float32)
        values, indices = sae_encode_reference(x.to(high), weight, bias, pre_bias, k=k, channel_dim=channel_dim)
        return _mean_of_selected(values, indices, weight.shape[0])
    a = pre_activations(x, weight, bias, pre_bias, channel_dim)
    a = a.reshape(x.shape[0], -1 if a.numel() else 0, weight.shape[0])
    active = a.relu() if threshold is None else torch.where(a <= threshold.to(a.dtype), 0.0, a)
    return active.mean(1)


def _mean_of_selected(values: Tensor, indices: Tensor, latents: int) -> Tensor:
    """Return the mean over the tokens of every row as [R, M], added up in the same order every time."""
    rows, k = values.shape[0], values.shape[-1]
    tokens = values.numel() // max(rows * k, 1)
    places = indices.reshape(rows, -1).to(torch.int64) + torch.arange(rows, device=values.device).unsqueeze(1) * latents
    means = values.new_zeros(rows * latents)
    if means.is_cuda:
        means.index_put_((places.flatten(),), values.flatten(), accumulate=True)  # sorts, where scatter_add races
    else:
        means.scatter_add_(0, places.flatten(), values.flatten())
    return means.view(rows, latents) / tokens


def _choose(x: Tensor, weight: Tensor, channel_dim: int) -> Launch:
    if weight.dtype not in DTYPE_CODES or not weight.numel():
        return Launch("reference")
    return choose("sae_encode_mean", x, x, channel_dim)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    threshold: Tensor | None,
    k: int | None,
    channel_dim: int,
) -> Tensor:
    options = {"threshold": threshold, "k": k, "channel_dim": channel_dim}
    launch = _choose(x, weight, channel_dim)
    if launch.backend == "reference":
        return sae_encode_mean_reference(x, weight, bias, pre_bias, **options)  # type: ignore[arg-type]
    if k is not None:
        return _mean_of_selected(*encode_topk(x, weight, bias, pre_bias, k, channel_dim), weight.shape[0])
    out = torch.empty(x.shape[0], weight.shape[0], device=x.device)
    assert launch.source is not None
    if launch.backend == "cpu":
        module, latents = backends.extension(), weight.shape[0]
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        vectors = (padded_floats(bias, latents), None if pre_bias is None else pre_bias.float().contiguous())
        limits = None if threshold is None else padded_floats(threshold, latents)
        places = addresses(x, weight, *vectors, limits, out)
        sizes = (*launch.source, latents, weight.stride(0), DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype])
        module.sae_encode_mean(*places, *sizes, torch.get_num_threads())
    else:
        with on_device(x):
            kernels = backends.load_kernels("sae_encode_mean")
            kernels.launch(out, x, weight, bias, pre_bias, threshold, launch.source)
    return out


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


_plain, _ = declare("sae_encode_mean", _SCHEMA, _forward, fake=_fake)


def sae_encode_mean(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    k: int | None = None,
    channel_dim: int = -1,
) -> Tensor:
    """Return the mean activation of every latent over the tokens of each row.

    With a = weight (x - pre_bias) + bias, the activation is max(a, 0); with `threshold`, a where a > threshold, else
    0 (JumpReLU); with `k`, max(a, 0) of the k largest of each token as in `sae_encode`. Sums are fp32 in the order of
    the tokens, the same with any number of threads. Memory beyond the result is a tile. Has no gradient.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        weight: [M, D], the encoder, of a floating dtype, as the following.
        bias: [M] or None.
        pre_bias: [D] or None; subtracted from `x`.
        threshold: [] or [M], or None.
        k: 1 to M, or None; not together with `threshold`.
        channel_dim: where the channels are, -1 or 1.

    Returns:
        [R, M] fp32 (fp64 for fp64 `x`); NaN where there are no tokens.

    Raises:
        InputError: a shape, dtype, device or option does not fit.
    """
    width = check_activation(x, channel_dim, None)
    latents = check_latents(x, width, weight, bias=bias, pre_bias=pre_bias, threshold=threshold)
    if k is not None:
        if threshold is not None:
            raise InputError("threshold", value="a tensor", allowed="None, where k is given")
        check_choice(latents, k, "topk", None, None)
    if plain_torch_needed():
        options = {"threshold": threshold, "k": k, "channel_dim": channel_dim}
        return sae_encode_mean_reference(x, weight, bias, pre_bias, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        return _plain(x, weight, bias, pre_bias, threshold, k, channel_dim)


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    tensors = random_latents(case, x)
    options = dict(case.options)
    if options.pop("jump", False):
        generator = torch.Generator().manual_seed(case.seed + 3)
        threshold = torch.rand(tensors["weight"].shape[0], generator=generator) - 0.2
        # Away from every pre-activation of the case, since a jump is as large as the threshold.
        options["threshold"] = _between(threshold.to(case.device), x, tensors, channel_dim)
    return {"x": x, **tensors, **options, "channel_dim": channel_dim}


def _between(threshold: Tensor, x: Tensor, tensors: dict[str, Tensor], channel_dim: int) -> Tensor:
    """Move thresholds [M] into the middle of the gap between pre-activations that they lie in."""
    wide = [tensors[name].double() for name in ("weight", "bias", "pre_bias")]
    a = pre_activations(x.double(), wide[0], wide[1], wide[2], channel_dim).flatten(0, -2)
    above = torch.where(a > threshold, a, torch.inf).amin(0)
    below = torch.where(a > threshold, -torch.inf, a).amax(0)
    middle = (above + below) / 2
    return torch.where(middle.isfinite(), middle, threshold.double()).float()


def _implementation(x: Tensor, weight: Tensor, channel_dim: int = -1, **_: Any) -> str:
    return _choose(x, weight, channel_dim).backend


_ALL = "fp32, bf16, fp16 activations and weights; channels or tokens next to each other"
SPEC = OpSpec(
    name="sae_encode_mean",
    function=sae_encode_mean,
    reference=sae_encode_mean_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": _ALL},
    variants={"relu": {}, "jumprelu": {"jump": True}, "topk": {"k": 3}},
    sizes=({"latents": 450}, {"latents": 9}),
    defaults={"threshold": None, "k": None},
    wide=("x", "weight", "bias", "pre_bias"),
)
