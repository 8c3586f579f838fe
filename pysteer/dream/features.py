"""What is looked at in an activation: its channels as they are, or the latents of a sparse autoencoder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.models.sae import SparseAutoencoder
from pysteer.ops.sae_encode_mean import sae_encode_mean
from pysteer.steering.site import Site

RAW, SAE = "raw", "sae"


@dataclass(frozen=True, eq=False)
class Features:
    """The features of a site.

    Attributes:
        site: where they are read.
        width: D, channels of the site.
        sae: the autoencoder whose latents they are; None for the channels themselves.
    """

    site: Site
    width: int
    sae: SparseAutoencoder | None = None

    def __post_init__(self) -> None:
        if self.sae is not None and self.sae.width != self.width:
            raise InputError(
                f"width of the autoencoder for site {self.site.name}", value=self.sae.width, allowed=str(self.width)
            )
        if self.sae is not None and (self.sae.normalise != "none" or self.sae.reads != "activation"):
            value = f"normalise {self.sae.normalise}, reads {self.sae.reads}"
            raise InputError("autoencoder", value=value, allowed="normalise none, reads activation")

    @property
    def kind(self) -> str:
        """ "raw" or "sae"."""
        return RAW if self.sae is None else SAE

    @property
    def count(self) -> int:
        """M, how many there are."""
        return self.width if self.sae is None else self.sae.latents

    @property
    def channel_dim(self) -> int:
        """Where the channels of an activation of the site are."""
        return 1 if self.site.layout == "channels" else -1

    def digest(self) -> str:
        """A hash of what the features are: site and weights."""
        found = hashlib.sha256(f"{self.site.part}/{self.site.path}/{self.site.element}/{self.width}".encode())
        for name, tensor in self.sae.tensors().items() if self.sae is not None else ():
            found.update(name.encode())
            found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def means(self, x: Tensor) -> Tensor:
        """Mean of every feature over the tokens of a row, fp32 `[R, M]`; latents as the autoencoder chooses them.

        Top k over a batch is taken per token, so that a row does not depend on those beside it.

        Args:
            x: activation as the site gives it, `[R, L, D]`, `[R, D]` or `[R, D, *spatial]`.
        """
        if self.sae is None:
            return x.float().movedim(self.channel_dim, -1).reshape(len(x), -1, self.width).mean(1)
        sae = self.sae
        limit = torch.zeros((), device=x.device) if sae.activation == "relu" else sae.threshold
        pre = sae.bias if sae.centred else None
        given = {"k": sae.k} if sae.takes_k else {"threshold": limit}
        return sae_encode_mean(x, sae.encoder, sae.encoder_bias, pre, channel_dim=self.channel_dim, **given)

    def maps(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The chosen features of every row token by token, fp16 `[R, K, L]`.

        Args:
            x: activation as the site gives it.
            chosen: int64 `[R, K]`, features per row.
        """
        tokens = x.float().movedim(self.channel_dim, -1).reshape(len(x), -1, self.width)
        if self.sae is None:
            return tokens.transpose(1, 2).take_along_dim(chosen[:, :, None], 1).half()
        sae = self.sae
        if sae.takes_k:
            values, indices = replace(sae, activation="topk").encode(tokens)
            rows = zip(values, indices, chosen.to(indices.dtype), strict=True)  # one at a time: [L, K, k] of memory
            return torch.stack([(v[:, None] * (i[:, None] == c[:, None])).sum(-1).T for v, i, c in rows]).half()
        centred = tokens - sae.bias.float() if sae.centred else tokens
        weight = sae.encoder.float()[chosen]  # [R, K, D]
        a = torch.einsum("rld,rkd->rkl", centred, weight) + sae.encoder_bias.float()[chosen][:, :, None]
        limit = torch.zeros_like(a) if sae.threshold is None else sae.threshold.float()[chosen][:, :, None]
        return torch.where(a > limit, a, 0.0).half()

    def direction(self, feature: int) -> Tensor:
        """What adding the feature adds to a token, fp32 `[D]` of length 1."""
        if self.sae is None:
            one = torch.zeros(self.width)
            one[feature] = 1.0
            return one
        found = self.sae.decoder[feature].float()
        return found / found.norm().clamp_min(torch.finfo(torch.float32).tiny)

    def readers(self, features: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """What reads one feature per row: `w` fp32 `[R, D]` and `c` `[R]`, with activation `w x + c` of a token x.

        For latents this is their one row of the encoder, before the activation function; nothing else of it is touched.

        Args:
            features: int64 `[R]`.
            device: where they are needed.
        """
        numbers = features.cpu()
        if self.sae is None:
            return torch.nn.functional.one_hot(numbers, self.width).float().to(device), torch.zeros(
                len(numbers), device=device
            )
        w = self.sae.encoder[numbers].float()
        c = self.sae.encoder_bias[numbers].float()
        if self.sae.centred:
            c = c - w @ self.sae.bias.float()
        return w.to(device), c.to(device)
