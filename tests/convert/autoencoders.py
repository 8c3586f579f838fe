"""Small folders of published autoencoders, and what their code computes, written from its formulas."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LATENTS, WIDTH, K = 12, 5, 3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder() -> Tensor:
    """[M, D]."""
    return draw(1, LATENTS, WIDTH)


def decoder() -> Tensor:
    """[M, D]."""
    return 2 * draw(2, LATENTS, WIDTH)


ENCODER_BIAS, BIAS = draw(3, LATENTS), draw(4, WIDTH)
THRESHOLD = draw(5, LATENTS).abs()
GATES = {"r_mag": 0.5 * draw(6, LATENTS), "b_gate": draw(7, LATENTS), "b_mag": draw(8, LATENTS)}


def top(a: Tensor, k: int = K) -> Tensor:
    return torch.zeros_like(a).scatter(-1, a.topk(k, -1).indices, a.topk(k, -1).values.relu())


def affine(x: Tensor, centred: bool = True) -> Tensor:
    return (x - BIAS if centred else x) @ encoder().T + ENCODER_BIAS


def jump(x: Tensor, centred: bool = True) -> Tensor:
    a = affine(x, centred)
    return a.relu() * (a > THRESHOLD)


def gated(x: Tensor) -> Tensor:
    inner = (x - BIAS) @ encoder().T
    return (inner + GATES["b_gate"] > 0) * (GATES["r_mag"].exp() * inner + GATES["b_mag"]).relu()


def rebuilt(latents: Tensor) -> Tensor:
    return latents @ decoder() + BIAS


# ------------------------------------------------------------------------------------------------------------ folders


def sparsify(folder: Path, **config: Any) -> Path:
    tensors = {"encoder.weight": encoder(), "encoder.bias": ENCODER_BIAS, "W_dec": decoder(), "b_dec": BIAS}
    save_file(tensors, folder / "sae.safetensors")
    own = {"activation": "topk", "expansion_factor": 32, "num_latents": LATENTS, "k": K, "d_in": WIDTH}
    (folder / "cfg.json").write_text(json.dumps({**own, **config}))
    return folder


def saelens(folder: Path, architecture: str, tensors: dict[str, Tensor] | None = None, /, **config: Any) -> Path:
    held = {"W_enc": encoder().T.contiguous(), "W_dec": decoder(), "b_dec": BIAS}
    held |= GATES if architecture == "gated" else {"b_enc": ENCODER_BIAS}
    held |= {"threshold": THRESHOLD} if architecture == "jumprelu" else {}
    own: dict[str, Any] = {"d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "architecture": architecture}
    own |= {"k": K} if architecture == "topk" else {}
    own |= {"metadata": {"sae_lens_version": "6.18.0", "hook_name": "blocks.3.hook_resid_post"}}
    save_file({**held, **(tensors or {})}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**own, **config}))
    return folder


def _linear() -> dict[str, Tensor]:
    return {"encoder.weight": encoder(), "encoder.bias": ENCODER_BIAS, "decoder.weight": decoder().T}


def _own() -> dict[str, Tensor]:
    return {"W_enc": encoder().T, "b_enc": ENCODER_BIAS, "W_dec": decoder(), "b_dec": BIAS}


def _chosen(threshold: float) -> dict[str, Tensor]:
    return {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}


DICTIONARIES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "AutoEncoder": lambda: {**_linear(), "bias": BIAS},
    "AutoEncoderNew": lambda: {**_linear(), "decoder.bias": BIAS},
    "GatedAutoEncoder": lambda: {
        **{name: tensor for name, tensor in _linear().items() if name != "encoder.bias"},
        "decoder_bias": BIAS,
        "r_mag": GATES["r_mag"],
        "gate_bias": GATES["b_gate"],
        "mag_bias": GATES["b_mag"],
    },
    "JumpReluAutoEncoder": lambda: {**_own(), "threshold": THRESHOLD},
    "AutoEncoderTopK": lambda: {**_linear(), "b_dec": BIAS, **_chosen(0.4)},
    "BatchTopKSAE": lambda: {**_linear(), "b_dec": BIAS, **_chosen(0.4)},
    "MatryoshkaBatchTopKSAE": lambda: {**_own(), **_chosen(0.4), "group_sizes": torch.tensor([4, 8])},
}


def dictionary(folder: Path, kind: str, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    held = {**DICTIONARIES[kind](), **(tensors or {})}
    torch.save(held, folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": WIDTH, "dict_size": LATENTS, "k": K, **config}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


def unbox(folder: Path, statistics: bool = True, **config: Any) -> Path:
    state = {"encoder.weight": encoder(), "decoder.weight": decoder().T, "pre_bias": BIAS, "latent_bias": ENCODER_BIAS}
    state["stats_last_nonzero"] = torch.zeros(LATENTS, dtype=torch.long)
    torch.save({"state_dict": state}, folder / "state_dict.pth")
    if statistics:
        torch.save(draw(9, LATENTS).abs(), folder / "mean.pt")
        torch.save(draw(10, LATENTS).abs(), folder / "std.pt")
    own = {"n_dirs_local": LATENTS, "d_model": WIDTH, "k": K, "auxk": 2, "dead_steps_threshold": 9}
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    return folder
