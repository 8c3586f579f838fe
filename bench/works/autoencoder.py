"""Work for autoencoders: encode activations of SmolLM2 into the k largest latents, and decode them.

The weights are random, the activations real; works are `reconstruct, N tokens`. "Unsteered" here is the activation
itself, the plain formulas are a dense encoder, top k, a scatter and a dense decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.serving import Prepared

LATENTS, KEPT, LAYER = 16, 32, 10  # latents per unit of width, latents kept per token, block whose output is encoded
TEXT = "The old lighthouse keeper climbed the stairs every evening to light the lamp before the ships came home. "


def write_case(folder: Path, layers: int | None = None) -> None:
    """Activations and weights in `autoencoder.safetensors`; `layers` is not used."""
    path = folder / "autoencoder.safetensors"
    if path.is_file():
        return
    from pysteer.models.language import smollm2

    lm = smollm2()
    with torch.no_grad():
        out = lm.read([TEXT * 24], output_hidden_states=True)
    x = out.hidden_states[LAYER + 1][0, 1:513].float()  # without the attention sink
    x = (x - x.mean(0)) / x.std()
    generator = torch.Generator().manual_seed(0)
    width = x.shape[1]
    encoder = torch.randn(LATENTS * width, width, generator=generator) / width**0.5
    bias = 0.1 * torch.randn(len(encoder), generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"x": x.contiguous(), "encoder": encoder, "bias": bias, "decoder": encoder.clone()}, path)


def load_case(folder: Path, work_name: str) -> dict[str, Tensor]:
    """`x` `[N, D]`, `encoder` and `decoder` `[M, D]`, `bias` `[M]`."""
    case: dict[str, Tensor] = load_file(folder / "autoencoder.safetensors")
    case["x"] = case["x"][: int(work_name.split("-")[1])].contiguous()
    return case


def _plain(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor) -> Tensor:
    """Dense encoder, top k, scatter, dense decoder."""
    values, places = (x @ encoder.T + bias).relu().topk(KEPT, dim=-1)
    latents = torch.zeros(len(x), len(encoder)).scatter_(-1, places, values)
    return latents @ decoder


def _ours(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor) -> Tensor:
    from pysteer.ops.sae_decode import sae_decode
    from pysteer.ops.sae_encode import sae_encode

    return sae_decode(*sae_encode(x, encoder, bias, k=KEPT), decoder)


def prepare(kind: str, folder: Path, work_name: str) -> Prepared:
    """A contender with a work: `unsteered`, `plain` or `pysteer`, eager or compiled."""
    how, _, mode = kind.partition(" ")
    case = load_case(folder, work_name)
    call: Any = {"unsteered": lambda x, *rest: x.clone(), "plain": _plain, "pysteer": _ours}[how]
    if mode == "compiled":
        call = torch.compile(call)

    def run() -> Tensor:
        return call(case["x"], case["encoder"], case["bias"], case["decoder"])

    return Prepared(run, run, len(case["x"]))
