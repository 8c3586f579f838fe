"""What is measured of `sae_edit`: a few of the 20480 latents of published autoencoders, at width 1280."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.registry import BF16, BOTH, CPU, FP32, GPU, Row, Timed, copied, copy_of_x, elements
from pysteer.ops import Case

LATENTS, ACTIVE = 20480, 32


def _row(case: Case, variant: str, devices: tuple[str, ...] = CPU) -> Row:
    return Row("sae_edit", case, devices, variant)


def _case(rows: int, dtype: torch.dtype, edits: int, layout: str = "tokens", **sizes: int) -> Case:
    return Case(rows, 256, 1280, dtype, layout, "one", sizes={"edits": edits, **sizes})


FULL = {"latents": LATENTS, "k": ACTIVE, "bias": 2}  # an edited latent is among the first k of every sixth token
ROWS = [
    _row(_case(4, FP32, 1), "linear", BOTH),
    _row(_case(4, FP32, 1), "relu"),
    _row(_case(4, BF16, 1), "relu", BOTH),
    _row(_case(4, BF16, 3), "threshold", BOTH),
    _row(_case(4, FP32, 8), "relu"),
    _row(_case(4, FP32, 1, "channels_first"), "relu"),
    _row(_case(4, BF16, 3, "channels_first"), "threshold", BOTH),
    _row(_case(4, FP32, 1, **FULL), "topk", BOTH),
    _row(_case(4, BF16, 1, **FULL), "topk", BOTH),
    _row(_case(80, BF16, 1), "relu", GPU),
    _row(_case(80, BF16, 3, **FULL), "topk", GPU),
]


def cost(case: Case) -> tuple[int, int]:
    """One read, one write; two products per token and edit."""
    return copied(case), 4 * elements(case) * case.sizes["edits"]


def floor(inputs: dict[str, Any]) -> Timed:
    """A copy, or the product with all latents where edits are ranked among them."""
    if inputs.get("gate") != "topk":
        return copy_of_x(inputs)
    x, weight = inputs["x"].movedim(inputs["channel_dim"], -1), inputs["full_encoder"].to(inputs["x"].dtype)
    return "matmul", partial(torch.nn.functional.linear, x, weight)


@cache
def _autoencoder(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(LATENTS, width, generator=generator) / width**0.5
    given = (weight, torch.zeros(LATENTS), weight / weight.norm(dim=1, keepdim=True), torch.zeros(width))
    encoder, bias, decoder, centre = (each.to(device=device, dtype=dtype) for each in given)
    return encoder, bias, decoder, centre


def _edit_by_decoding(x: Tensor, channel_dim: int, latents: list[int], factor: float) -> Tensor:
    """Encode, keep the top k, change some, decode both and add the difference."""
    tokens = x.movedim(channel_dim, -1)
    encoder, bias, decoder, centre = _autoencoder(tokens.shape[-1], x.dtype, x.device)
    active = torch.relu(torch.nn.functional.linear(tokens - centre, encoder, bias))
    values, indices = active.topk(ACTIVE, -1, sorted=False)
    code = torch.zeros_like(active).scatter_(-1, indices, values)
    before = code @ decoder + centre
    code[..., latents] *= factor
    return (tokens + (code @ decoder + centre - before)).movedim(-1, channel_dim).contiguous()


def naive(inputs: dict[str, Any]) -> Timed:
    """The hook of published unlearning code."""
    latents = list(range(inputs["encoder"].shape[1]))
    return "encode + two dense decodes", partial(_edit_by_decoding, inputs["x"], inputs["channel_dim"], latents, -1.0)
