"""Sparse autoencoders: encoder and decoder with their activation, read from safetensors and JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.ops.sae_decode import sae_decode
from pysteer.ops.sae_encode import sae_encode

ACTIVATIONS = ("topk", "batch_topk", "sample_topk", "jumprelu", "relu")
NORMALISATIONS = ("none", "layer_norm", "unit_norm")
READS = ("activation", "delta")
WEIGHTS, CONFIG = "sae.safetensors", "config.json"
_FORMAT = "pysteer-sae-1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_LATENTS = 2**24
_FIRST_CAPACITY = 256  # room for latents of a token that is tried first where their number is open


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A sparse autoencoder with M latents of width D.

    `a = encoder (x - bias) + encoder_bias` (without `- bias` unless `centred`); active are the latents that
    `activation` says, with `relu(a)`; the reconstruction is `sum_active relu(a_j) decoder_j + bias`.

    - "topk": the k largest of each token. "batch_topk", "sample_topk": k per token on average over all tokens, or over
      those of a row.
    - "jumprelu": those with `a > threshold` (Rajamanoharan et al. 2024). "relu": those with `a > 0`.

    Attributes:
        encoder: `[M, D]`.
        encoder_bias: `[M]`.
        decoder: `[M, D]`, a direction per latent.
        bias: `[D]`, added to the reconstruction.
        activation: see above.
        k: latents per token, for the three kinds of top k; None for the others.
        threshold: `[M]`, for "jumprelu"; None for the others.
        centred: whether `bias` is taken off before encoding.
        normalise: what is done to each token before encoding and undone after decoding: "none", "layer_norm" (mean 0
            and standard deviation 1 over the channels) or "unit_norm" (length `sqrt(D)`).
        latent_mean, latent_std: `[M]`, mean and standard deviation of every latent where it is active, where known.
        meta: where it comes from, plain JSON types. `meta["reads"]` is "delta" if `x` is what a module adds, its output
            minus its input; otherwise it is the activation itself.

    Tensors are fp32, bf16 or fp16, not all alike. Arithmetic is fp32.

    Raises:
        InputError: shapes, dtypes or options do not fit together.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    bias: Tensor
    activation: str = "topk"
    k: int | None = None
    threshold: Tensor | None = None
    centred: bool = True
    normalise: str = "none"
    latent_mean: Tensor | None = None
    latent_std: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.encoder.dim() != 2 or 0 in self.encoder.shape or len(self.encoder) > _MOST_LATENTS:
            raise InputError(
                "shape of encoder", value=list(self.encoder.shape), allowed=f"[M, D], M <= {_MOST_LATENTS}"
            )
        latents, width = self.encoder.shape
        shapes = _shapes(latents, width)
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes[name]:
                raise InputError(f"shape of {name}", value=list(tensor.shape), allowed=str(list(shapes[name])))
            if tensor.dtype not in _DTYPES:
                raise InputError(f"dtype of {name}", value=str(tensor.dtype), allowed="fp32, bf16 or fp16")
        _check_choice("activation of the autoencoder", self.activation, ACTIVATIONS)
        _check_choice("normalisation of the autoencoder", self.normalise, NORMALISATIONS)
        _check_choice("what the autoencoder reads", self.reads, READS)
        if not isinstance(self.centred, bool):
            raise InputError("centred", value=self.centred, allowed="true or false")
        if self.takes_k and (type(self.k) is not int or not 1 <= self.k <= latents):
            raise InputError(f"k of {self.activation}", value=self.k, allowed=f"1 to {latents}")
        if not self.takes_k and self.k is not None:
            raise InputError(f"k of {self.activation}", value=self.k, allowed="None")
        if (self.activation == "jumprelu") != (self.threshold is not None):
            allowed = "[M]" if self.threshold is None else "None"
            raise InputError(f"threshold of {self.activation}", value=_shown(self.threshold), allowed=allowed)

    @property
    def takes_k(self) -> bool:
        """Whether the number of latents is given rather than a threshold."""
        return self.activation in ("topk", "batch_topk", "sample_topk")

    @property
    def latents(self) -> int:
        """M, how many latents there are."""
        return self.encoder.shape[0]

    @property
    def width(self) -> int:
        """D, how many channels the activation has."""
        return self.encoder.shape[1]

    @property
    def reads(self) -> str:
        """ "activation", or "delta" for what a module adds to its input."""
        return str(self.meta.get("reads", "activation"))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        given = {name: getattr(self, name) for name in _NAMES}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "SparseAutoencoder":
        """The same on another device or with other types."""
        moved: dict[str, Any] = {name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def encode(self, x: Tensor, capacity: int | None = None, channel_dim: int = -1) -> tuple[Tensor, Tensor]:
        """Values and indices of the active latents of every token, largest first.

        Args:
            x: `[R, D]`, `[R, *tokens, D]`, or `[R, D, *tokens]` with `channel_dim` 1.
            capacity: C, the most latents of a token. By default as many as are needed: where their number is open this
                waits for the device to count them, and top k over a batch gives a token 4 k at most.

        Returns:
            values `[R, *tokens, C]` like `x` and indices `[R, *tokens, C]` int32, -1 where a token has fewer; see
            `pysteer.ops.sae_encode`.
        """
        if x.shape[channel_dim] != self.width:
            raise InputError(
                "width of the activations", value=x.shape[channel_dim], allowed=f"{self.width}, as the SAE"
            )
        x, _, _ = self._normalised(x, channel_dim)
        given: dict[str, Any] = {"bias": self.encoder_bias, "channel_dim": channel_dim}
        given["pre_bias"] = self.bias if self.centred else None
        if self.takes_k:
            room = None if self.activation == "topk" else capacity
            return sae_encode(x, self.encoder, k=self.k, mode=self.activation, capacity=room, **given)
        limit = self.threshold if self.threshold is not None else torch.zeros((), device=x.device)
        given |= {"mode": "threshold", "threshold": limit}
        if capacity is not None:
            return sae_encode(x, self.encoder, capacity=capacity, **given)
        room = min(_FIRST_CAPACITY, self.latents)
        while True:
            values, indices = sae_encode(x, self.encoder, capacity=room, **given)
            if room == self.latents or not bool((indices[..., -1] >= 0).any()):
                return values, indices
            room = min(4 * room, self.latents)

    def decode(self, values: Tensor, indices: Tensor, residual: Tensor | None = None) -> Tensor:
        """`sum_i values_i decoder[indices_i] + bias + residual`, `[*, D]`, see `pysteer.ops.sae_decode`.

        With a `normalise` other than "none" this is the normalised activation; `reconstruct` undoes it.
        """
        return sae_decode(values, indices, self.decoder, self.bias, residual)

    def reconstruct(self, x: Tensor, channel_dim: int = -1) -> Tensor:
        """What the active latents explain of `x`, like `x`."""
        values, indices = self.encode(x, channel_dim=channel_dim)
        wide = torch.promote_types(x.dtype, torch.float32)
        start = values.new_zeros(*values.shape[:-1], self.width, dtype=wide)  # gives the sum its dtype
        y = self.decode(values, indices, start)
        _, mean, scale = self._normalised(x, channel_dim)
        if scale is not None:
            y = y * scale
        if mean is not None:
            y = y + mean
        return y.to(x.dtype).movedim(-1, channel_dim)

    def dense(self, x: Tensor, latents: Sequence[int] | None = None, channel_dim: int = -1) -> Tensor:
        """Values of the given latents, 0 where they are not active: `[R, *tokens, len(latents)]` like `x`.

        Args:
            latents: their numbers; None for all.
        """
        chosen = list(range(self.latents)) if latents is None else [int(latent) for latent in latents]
        for latent in chosen:
            if not 0 <= latent < self.latents:
                raise InputError("latent", value=latent, allowed=f"0 to {self.latents - 1}")
        values, indices = self.encode(x, channel_dim=channel_dim)
        column = torch.full(
            (self.latents + 1,), len(chosen), device=x.device
        )  # the last one takes what is not asked for
        column[chosen] = torch.arange(len(chosen), device=x.device)
        found = values.new_zeros(*values.shape[:-1], len(chosen) + 1)
        where = torch.where(indices < 0, self.latents, indices).long()
        return found.scatter(-1, column[where], values)[..., :-1]

    def with_unit_decoder(self) -> "SparseAutoencoder":
        """The same function with decoder directions of length 1; values of latents become their share of `x`.

        Raises:
            InputError: top k, whose choice would change.
        """
        if self.takes_k:
            raise InputError("unit directions", value=self.activation, allowed="relu, jumprelu")
        length = self.decoder.float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)

        def scaled(tensor: Tensor, by: Tensor) -> Tensor:
            return (tensor.float() * by).to(tensor.dtype)

        limits = None if self.threshold is None else scaled(self.threshold, length)
        return replace(
            self,
            encoder=scaled(self.encoder, length[:, None]),
            encoder_bias=scaled(self.encoder_bias, length),
            decoder=scaled(self.decoder, 1 / length[:, None]),
            threshold=limits,
        )

    def _normalised(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalised tokens, and mean and scale `[R, *tokens, 1]` that undo it, in fp32."""
        if self.normalise == "none":
            return x, None, None
        wide = x.movedim(channel_dim, -1).to(torch.promote_types(x.dtype, torch.float32))
        if self.normalise == "unit_norm":
            scale = wide.norm(dim=-1, keepdim=True) / math.sqrt(self.width)
            return (wide / scale.clamp_min(torch.finfo(wide.dtype).tiny)).movedim(-1, channel_dim), None, scale
        mean = wide.mean(-1, keepdim=True)
        scale = wide.std(-1, keepdim=True)
        return ((wide - mean) / (scale + 1e-5)).movedim(-1, channel_dim), mean, scale

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `sae.safetensors` and `config.json` into `folder`."""
        config = {
            "format": _FORMAT,
            "activation": self.activation,
            "k": self.k,
            "centred": self.centred,
            "normalise": self.normalise,
            "meta": self.meta,
        }
        # Copies, because encoder and decoder may be one tensor, which the format refuses.
        files.write_safetensors(Path(folder) / WEIGHTS, {name: t.clone() for name, t in self.tensors().items()})
        files.write_json(Path(folder) / CONFIG, config)
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SparseAutoencoder":
        """Read what `save_pretrained` wrote.

        Raises:
            InputError: a file is missing or damaged; tensors are missing, unknown, of a wrong shape or dtype, or hold
                NaN or infinite values.
        """
        config = files.read_json(Path(folder) / CONFIG, "configuration of the autoencoder")
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            found = config.get("format") if isinstance(config, dict) else type(config).__name__
            raise InputError("format of the autoencoder", value=found, allowed=_FORMAT)
        if not isinstance(config.get("meta"), dict):
            raise InputError("meta of the autoencoder", value=config.get("meta"), allowed="a JSON object")
        tensors, _ = files.read_safetensors(Path(folder) / WEIGHTS, "autoencoder")
        for name in tensors:
            if name not in _NAMES:
                raise InputError("unexpected tensor of the autoencoder", value=name, allowed=", ".join(_NAMES))
        for name in _NAMES[:4]:
            if name not in tensors:
                raise InputError("the autoencoder lacks a tensor", value=name, fix="convert or fetch it again")
        options = {name: config.get(name) for name in ("activation", "k", "centred", "normalise", "meta")}
        return cls(**tensors, **options)  # type: ignore[arg-type]


_NAMES = ("encoder", "encoder_bias", "decoder", "bias", "threshold", "latent_mean", "latent_std")


def _shapes(latents: int, width: int) -> dict[str, tuple[int, ...]]:
    wide = {"encoder": (latents, width), "decoder": (latents, width), "bias": (width,)}
    return {name: wide.get(name, (latents,)) for name in _NAMES}


def _check_choice(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(what, value=value, allowed=", ".join(allowed))


def _shown(tensor: Tensor | None) -> str:
    return "None" if tensor is None else json.dumps(list(tensor.shape))
