"""`sae_decode`: y = sum_i v_i W[index_i] + b (+ residual), the rows of a decoder weighted by a few active latents.

A sparse autoencoder writes an activation as k out of M directions. Gathering k rows costs k D multiplications a token,
the usual scatter into zeros and dense product M D.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.declare import declare, plain_torch_needed
from pysteer.ops.launch import addresses, on_device
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.registry import Case, OpSpec, activation

_SCHEMA = "(Tensor values, Tensor indices, Tensor decoder, Tensor? bias, Tensor? residual) -> Tensor"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _gather(indices: Tensor, decoder: Tensor, high: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return which indices mean a latent, and the rows of all of them in `high`."""
    known = (indices >= 0) & (indices < decoder.shape[0])
    return known.unsqueeze(-1), decoder.to(high)[torch.where(known, indices, 0).long()]


def _high(*tensors: Tensor) -> torch.dtype:
    high = torch.float32
    for tensor in tensors:
        high = torch.promote_types(high, tensor.dtype)
    return high


def sae_decode_reference(
    values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return what `sae_decode` computes, in plain torch; fp64 inputs are computed in fp64."""
    high = _high(values, decoder)
    known, rows = _gather(indices, decoder, high)
    y = torch.where(known, values.to(high).unsqueeze(-1) * rows, 0).sum(-2)
    for term in (bias, residual):
        y = y if term is None else y + term.to(high)
    wrong = ((indices < -1) | (indices >= decoder.shape[0])).any(-1, keepdim=True)
    return y.masked_fill(wrong, torch.nan).to((decoder if residual is None else residual).dtype)


def _choose(*tensors: Tensor | None) -> str:
    """Return the first live backend, where all floating-point tensors have a dtype that kernels take."""
    given = [each for each in tensors if each is not None]
    if all(each.dtype in DTYPE_CODES and each.numel() for each in given):
        for name in backends.choices(given[0].device.type):
            if backends.provides(name, "sae_decode"):
                return name
    return "reference"


def _rows_apart(weight: Tensor) -> Tensor:
    """Return a matrix whose rows may be apart but whose channels are next to each other."""
    return weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()


def _raise_for(indices: Tensor, latents: int) -> None:
    wrong = indices[(indices < -1) | (indices >= latents)]
    if wrong.numel():
        raise InputError("indices", value=wrong[0].item(), allowed=f"0 to {latents - 1}, or -1 for nothing")


def _forward(values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return decode_into(_like_result(values, indices, decoder, bias, residual), values, indices, decoder, bias, residual)


def decode_into(
    out: Tensor, values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Write what `sae_decode` computes into `out`, contiguous, which may be `residual`."""
    name = _choose(values, decoder, bias, residual)
    if name == "reference":
        if values.device.type == "cpu":
            _raise_for(indices, decoder.shape[0])
        return out.copy_(sae_decode_reference(values, indices, decoder, bias, residual))
    values, indices, decoder = values.contiguous(), indices.contiguous(), _rows_apart(decoder)
    bias = None if bias is None else bias.float().contiguous()
    residual = None if residual is None else residual.contiguous()
    if name == "triton":
        with on_device(values):
            backends.load_kernels("sae_decode").launch(out, values, indices, decoder, bias, residual)
        return out
    codes = (DTYPE_CODES[values.dtype], DTYPE_CODES[decoder.dtype], DTYPE_CODES[out.dtype])
    tokens, count = values.numel() // values.shape[-1], values.shape[-1]
    places = addresses(values, indices, decoder, bias, residual, out)
    sizes = (tokens, count, *decoder.shape, decoder.stride(0))
    if backends.extension().sae_decode(*places, *sizes, *codes, torch.get_num_threads()):
        _raise_for(indices, decoder.shape[0])
    return out


def _like_result(
    values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    dtype = (decoder if residual is None else residual).dtype
    return values.new_empty((*values.shape[:-1], decoder.shape[1]), dtype=dtype)


def _values_backward_reference(gradient: Tensor, indices: Tensor, decoder: Tensor) -> Tensor:
    high = _high(gradient, decoder)
    known, rows = _gather(indices, decoder, high)
    return torch.where(known, gradient.to(high).unsqueeze(-2) * rows, 0).sum(-1)


def _values_backward(gradient: Tensor, indices: Tensor, decoder: Tensor) -> Tensor:
    name = _choose(gradient, decoder)
    if name == "reference" or not indices.numel():
        return _values_backward_reference(gradient, indices, decoder).contiguous()
    gradient, indices, decoder = gradient.contiguous(), indices.contiguous(), _rows_apart(decoder)
    out = gradient.new_empty(indices.shape, dtype=torch.float32)
    if name == "triton":
        with on_device(gradient):
            backends.load_kernels("sae_decode").launch_values_backward(out, gradient, indices, decoder)
        return out
    tokens, count = indices.numel() // indices.shape[-1], indices.shape[-1]
    codes = (DTYPE_CODES[gradient.dtype], DTYPE_CODES[decoder.dtype])
    sizes = (tokens, count, *decoder.shape, decoder.stride(0))
    places = addresses(gradient, indices, decoder, out)
    backends.extension().sae_decode_values_backward(*places, *sizes, *codes, torch.get_num_threads())
    return out


def _weight_backward_reference(gradient: Tensor, values: Tensor, indices: Tensor, latents: int) -> Tensor:
    high = _high(gradient, values)
    known = (indices >= 0) & (indices < latents)
    terms = torch.where(known, values.to(high), 0).unsqueeze(-1) * gradient.to(high).unsqueeze(-2)
    zeros = torch.zeros(latents, gradient.shape[-1], dtype=high, device=gradient.device)
    return zeros.index_add(0, torch.where(known, indices, 0).flatten().long(), terms.flatten(0, -2))


def _weight_backward(gradient: Tensor, values: Tensor, indices: Tensor, latents: int, dtype: torch.dtype) -> Tensor:
    name = _choose(gradient, values)
    if name == "reference" or dtype not in DTYPE_CODES or not latents:
        return _weight_backward_reference(gradient, values, indices, latents).to(dtype)
    gradient, values, indices = gradient.contiguous(), values.contiguous(), indices.contiguous()
    out = gradient.new_empty((latents, gradient.shape[-1]), dtype=dtype)
    if name == "triton":
        with on_device(gradient):
            backends.load_kernels("sae_decode").launch_weight_backward(out, gradient, values, indices)
        return out
    codes = (DTYPE_CODES[gradient.dtype], DTYPE_CODES[values.dtype], DTYPE_CODES[dtype])
    sizes = (indices.numel() // indices.shape[-1], indices.shape[-1], *out.shape)
    places = addresses(gradient, values, indices, out)
    backends.extension().sae_decode_weight_backward(*places, *sizes, *codes, torch.get_num_threads())
    return out


_in_values, _ = declare(
    "sae_decode_values_backward",
    "(Tensor gradient, Tensor indices, Tensor decoder) -> Tensor",
    _values_backward,
    fake=lambda gradient, indices, decoder: gradient.new_empty(indices.shape, dtype=_high(gradient, decoder)),
)
_in_weight, _ = declare(
    "sae_decode_weight_backward",
    "(Tensor gradient, Tensor values, Tensor indices, SymInt latents, ScalarType dtype) -> Tensor",
    _weight_backward,
    fake=lambda gradient, values, indices, latents, dtype: gradient.new_empty(
        (latents, gradient.shape[-1]), dtype=dtype
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, decoder, bias, _ = inputs
    ctx.save_for_backward(values, indices, decoder)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, decoder = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    again = torch.is_grad_enabled()  # somebody differentiates the gradient, which plain torch can
    in_values = in_weight = in_bias = None
    if wanted[0]:
        call = _values_backward_reference if again else _in_values
        in_values = call(gradient, indices, decoder).to(values.dtype)
    if wanted[2]:
        if again:
            in_weight = _weight_backward_reference(gradient, values, indices, decoder.shape[0]).to(decoder.dtype)
        else:
            in_weight = _in_weight(gradient, values, indices, decoder.shape[0], decoder.dtype)
    if wanted[3]:
        in_bias = gradient.flatten(0, -2).sum(0, dtype=_high(gradient)).to(ctx.bias_dtype)
    return in_values, None, in_weight, in_bias, gradient.clone() if wanted[4] else None


_plain, _differentiable = declare(
    "sae_decode", _SCHEMA, _forward, fake=_like_result, setup_context=_setup_context, backward=_backward
)


def _say(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _check(values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    device = values.device
    if values.dtype not in _FLOATS or values.dim() < 2 or not values.shape[-1]:
        raise InputError("values", value=_say(values), allowed="float32, bfloat16 or float16 [*, k] with k >= 1")
    if indices.dtype is not torch.int32 or indices.shape != values.shape or indices.device != device:
        raise InputError("indices", value=_say(indices), allowed=f"int32 {list(values.shape)} on {device}, like values")
    if decoder.dtype not in _FLOATS or decoder.dim() != 2 or not len(decoder) or decoder.device != device:
        raise InputError("decoder", value=_say(decoder), allowed=f"float32, bfloat16 or float16 [M, D] on {device}")
    width = decoder.shape[1]
    if bias is not None and (bias.dtype not in _FLOATS or bias.shape != (width,) or bias.device != device):
        raise InputError("bias", value=_say(bias), allowed=f"a float dtype, [{width}] on {device}, or None")
    shape = [*values.shape[:-1], width]
    if residual is not None and (
        residual.dtype not in _FLOATS or list(residual.shape) != shape or residual.device != device
    ):
        raise InputError("residual", value=_say(residual), allowed=f"a float dtype, {shape} on {device}, or None")


def sae_decode(
    values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return y = sum_i values_i decoder[indices_i] + bias + residual for every token.

    Sums are fp32 in the order of the indices, with one rounding at the end. Differentiable in everything that is not an
    index; the gradient of `values` costs k dot products a token, that of `decoder` is added up latent by latent in the
    order of the tokens, the same at every run.

    Args:
        values: [*, k], activations of the active latents; fp32, bf16 or fp16 (fp64 in plain torch).
        indices: [*, k] int32, which latents; -1 contributes nothing. A latent may come up several times.
        decoder: [M, D], the direction of every latent, next to each other in memory; fp32, bf16 or fp16.
        bias: [D], or None.
        residual: [*, D], added as it is, for instance the part that the autoencoder does not explain; or None.

    Returns:
        [*, D] in the dtype of `residual`, or else of `decoder`.

    Raises:
        InputError: a shape, dtype or device does not fit, or, on a CPU, an index is out of range. On a GPU, where
            looking would wait for the device, such tokens come out as NaN, as they do in compiled plain torch.
    """
    _check(values, indices, decoder, bias, residual)
    if plain_torch_needed():
        return sae_decode_reference(values, indices, decoder, bias, residual)
    if torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (values, decoder, bias, residual)
    ):
        return _differentiable(values, indices, decoder, bias, residual)
    return _plain(values, indices, decoder, bias, residual)


def _make_inputs(case: Case) -> dict[str, Any]:
    residual, _ = activation(case)
    latents, count = case.sizes.get("latents", 40), case.sizes.get("k", 4)
    generator = torch.Generator().manual_seed(case.seed + 2)
    shape = (*residual.shape[:-1], count)
    values = torch.rand(shape, generator=generator)
    indices = torch.randint(0, latents, shape, generator=generator, dtype=torch.int32)
    if case.sizes.get("padded", 1):  # some tokens have fewer active latents
        indices[torch.rand(shape, generator=generator) < 0.15] = -1
    floats = {
        "values": values,
        "decoder": torch.randn(latents, case.width, generator=generator) / count**0.5,
        "bias": torch.randn(case.width, generator=generator),
    }
    floats = {name: tensor.to(device=case.device, dtype=case.dtype) for name, tensor in floats.items()}
    return {
        "values": floats["values"],
        "indices": indices.to(case.device),
        "decoder": floats["decoder"],
        "bias": floats["bias"],
        "residual": residual,
        **case.options,
    }


def _implementation(
    values: Tensor, decoder: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, **_: Any
) -> str:
    return _choose(values, decoder, bias, residual)


_ALL = "fp32, bf16, fp16, also mixed; gradients in values and decoder too"
SPEC = OpSpec(
    name="sae_decode",
    function=sae_decode,
    reference=sae_decode_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": _ALL},
    variants={"plain": {}},
    sizes=({"latents": 40, "k": 4}, {"latents": 7, "k": 1}, {"latents": 300, "k": 33}),
    gradients=("values", "decoder", "bias", "residual"),
    wide=("values", "decoder", "bias", "residual"),
    layouts=("tokens", "rows"),
    rowwise=("indices", "residual"),
)
