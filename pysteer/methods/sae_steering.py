"""Edits of a sparse autoencoder's latents: multiply, add, set, ablate, and unlearning of a concept."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, check_choice, register, tokens_of
from pysteer.ops.sae_edit import scale_and_add

if TYPE_CHECKING:
    from pysteer.models.sae import SparseAutoencoder

MODES = ("multiply", "add", "set", "ablate", "unlearn")
ERRORS = ("keep", "drop", "saeuron")
_TOKENS = 4096  # that are encoded at a time
_FOLDED: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()


@register
@dataclass(frozen=True)
class SAESteering(Method):
    """`y = x + s sum_j g_j (new a_j - a_j) d_j` over a few latents j (op `sae_edit`): the rest of x stays as it is.

    `a_j` is the latent where the autoencoder finds it active (g_j: the exact top k, or its threshold), `d_j` its
    direction. "multiply", "set" and "ablate" change active latents; "add" adds `value d_j` everywhere. To set a latent
    where it is not active too, ablate it and add a vector.

    Without `latents` the fit chooses `count` of them by the difference of their shares of all activity, `p = mean /
    (sum mean + 1e-8)`: those that mark the target for "add", in units of their mean there, and the source otherwise.

    "unlearn" (SAeUron, Cywinski and Deja 2025): with `mu` the mean latents of the source, all latents whose share in
    the source exceeds that in target and negatives by more than the `percentile` of this difference are replaced by
    `value mu_j a_j` where `a_j` exceeds its mean over the concepts (source, target, negatives), each counted once,
    times `floor`: 1 in the paper; above it, tokens of concepts that share the latent and activate it less stay.

    What the autoencoder does not explain, `x - D(E(x))`, is kept. `error="drop"` loses it, as some published hooks do,
    and `error="saeuron"` adds it with the wrong sign, as the published hook of SAeUron does, so that without any edit
    the result is `2 D(E(x)) - x`; both run through the whole autoencoder (op `sae_rebuild`, plain torch, slow).

    Args:
        sae: a `SparseAutoencoder` without normalisation, or the folder of a saved one.
        latents: which to edit; none for a choice by the fit.
        values: one for all latents or one for each: the factor, what is added, what is set, the factor of "unlearn".
        mode: "multiply", "add", "set", "ablate" or "unlearn".
        count: how many latents the fit chooses.
        percentile: of "unlearn".
        floor: of "unlearn", from which multiple of its mean over the concepts a latent is edited.
        error: "keep", "drop" or "saeuron".
    """

    name: ClassVar[str] = "sae_steering"

    sae: Any = ""
    latents: tuple[int, ...] = ()
    values: tuple[float, ...] = (1.0,)
    mode: str = "multiply"
    count: int = 4
    percentile: float = 99.99
    floor: float = 1.0
    error: str = "keep"

    def __post_init__(self) -> None:
        for name in ("latents", "values"):
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(given) if isinstance(given, Sequence) else (given,))
        check_choice("mode of sae_steering", self.mode, MODES)
        check_choice("error of sae_steering", self.error, ERRORS)
        if len(self.values) not in (1, len(self.latents)):
            allowed = f"1 or {len(self.latents)}, one per latent"
            raise InputError("values of sae_steering", value=len(self.values), allowed=allowed)
        if type(self.count) is not int or self.count < 1 or not 0 <= self.percentile <= 100:
            given = f"{self.count}, {self.percentile}"
            raise InputError("count and percentile", value=given, allowed="a whole number above 0, and 0 to 100")
        if not 0 <= self.floor < math.inf:
            raise InputError("floor of sae_steering", value=self.floor, allowed="a number from 0")

    @property
    def op(self) -> str:
        return "sae_edit" if self.error == "keep" else "sae_rebuild"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        edits: dict[str, tuple[str, ...]] = {"encoder": ("E", "D"), "encoder_bias": ("E",), "decoder": ("E", "D")}
        return edits | dict.fromkeys(("scale", "add", "level", "latent"), ("E",))

    def config(self) -> dict[str, Any]:
        """See `Method.config`; an autoencoder that was given as such is not part of it."""
        return {**super().config(), "sae": self.sae if isinstance(self.sae, str) else ""}

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; the result does not depend on `paired` nor on `seed`."""
        sae = self.autoencoder()
        given = [("source", source), ("target", target), ("negative", negatives)]
        classes = [tokens_of(x, what) for what, x in given if x is not None]
        for tokens in classes:
            if tokens.shape[1] != sae.width:
                raise InputError("width of the activations", value=tokens.shape[1], allowed=f"{sae.width}, as the SAE")
        if self.latents:
            return self.given(sae)
        means = torch.stack([mean_latents(sae, tokens) for tokens in classes])
        weight = means.new_tensor([len(tokens) for tokens in classes])
        if self.mode == "unlearn":
            return self.unlearn(sae, means, weight)
        marks = 1 if self.mode == "add" else 0
        chosen = concept_scores(means, weight, marks).topk(min(self.count, sae.latents)).indices.sort().values
        size = means[marks][chosen] if self.mode == "add" else torch.ones(len(chosen))
        return self._edit(sae, chosen, self.values[0] * size.float())

    def given(self, sae: "SparseAutoencoder | None" = None) -> SiteFit:
        """Parameters for the latents of the configuration; nothing is fitted."""
        sae = self.autoencoder() if sae is None else sae
        if not self.latents or self.mode == "unlearn":
            raise InputError(
                "latents to edit without a fit", value=f"{list(self.latents)}, {self.mode}", allowed="some"
            )
        if not 0 <= min(self.latents) <= max(self.latents) < sae.latents:
            raise InputError("latents to edit", value=list(self.latents), allowed=f"0 to {sae.latents - 1}")
        return self._edit(sae, torch.tensor(self.latents), torch.tensor(self.values).expand(len(self.latents)))

    def unlearn(self, sae: "SparseAutoencoder", means: Tensor, weight: Tensor, concept: int = 0) -> SiteFit:
        """Parameters that unlearn `concept`, from `means` `[C, M]` of the latents of C concepts over `weight` `[C]`
        samples each."""
        scores = concept_scores(means, weight, concept)
        chosen = (scores > quantile(scores, self.percentile / 100)).nonzero()[:, 0]
        value = self.values[0] * means[concept][chosen]
        return self._edit(sae, chosen, value.float(), floor=self.floor * means.mean(0)[chosen].float())

    def autoencoder(self) -> "SparseAutoencoder":
        """The autoencoder, read from its folder where a folder was given."""
        from pysteer.models.sae import SparseAutoencoder

        sae = self.sae
        if isinstance(sae, str):
            if not sae:
                raise InputError("autoencoder", value="none", allowed="a SparseAutoencoder or the folder of one")
            sae = SparseAutoencoder.from_pretrained(sae)
        if sae.normalise != "none" or sae.reads != "activation":
            value = f"normalise {sae.normalise}, reads {sae.reads}"
            raise InputError("autoencoder to steer with", value=value, allowed="normalise none, reads activation")
        return sae

    def _edit(self, sae: "SparseAutoencoder", latents: Tensor, value: Tensor, floor: Tensor | None = None) -> SiteFit:
        if not len(latents):  # an edit that does nothing keeps the shapes of the op
            latents, value = torch.zeros(1, dtype=torch.int64), torch.ones(1)
            floor = None if floor is None else torch.zeros(1)
            scale, add = scale_and_add("multiply", value)
        else:
            scale, add = scale_and_add("multiply" if self.mode == "unlearn" else self.mode, value.clone())
        chosen = latents.to(sae.encoder.device)
        level = torch.zeros_like(scale) if sae.threshold is None else sae.threshold.float()[chosen].to(scale)
        level = level if floor is None else torch.maximum(level, floor.to(level))
        bias = folded_bias(sae)
        tensors = {"scale": scale, "add": add, "level": level, "latent": latents.to(torch.int32)}
        tensors |= {"encoder": sae.encoder[chosen].float(), "encoder_bias": bias[chosen]}
        tensors["decoder"] = sae.decoder[chosen].float()
        options: dict[str, Any] = {"gate": "none" if self.mode == "add" else "topk" if sae.takes_k else "threshold"}
        shared = {}
        if options["gate"] == "topk" or self.error != "keep":
            options |= {"k": sae.k} if sae.takes_k else {}
            shared = {"full_encoder": sae.encoder, "full_bias": bias}
        if self.error != "keep":
            options["error"] = self.error
            shared |= {"full_decoder": sae.decoder, "decoder_bias": sae.bias.float()}
            if sae.threshold is not None:
                shared["full_level"] = sae.threshold.float()
        return SiteFit(tensors, options, shared)


def folded_bias(sae: "SparseAutoencoder") -> Tensor:
    """`[M]` fp32: the bias of `encoder x`, with the centre folded in; the same tensor for the same autoencoder."""
    if sae not in _FOLDED:
        bias = sae.encoder_bias.float()
        if sae.centred:
            bias = bias - sae.encoder.float() @ sae.bias.float()
        _FOLDED[sae] = bias
    return _FOLDED[sae]


def mean_latents(sae: "SparseAutoencoder", tokens: Tensor) -> Tensor:
    """Mean of every latent over `tokens` `[n, D]`, 0 where it is not active, fp64 `[M]`; top k is per token."""
    sae = replace(sae, activation="topk") if sae.takes_k else sae
    total = torch.zeros(sae.latents + 1, dtype=torch.float64, device=tokens.device)
    for part in tokens.split(_TOKENS):
        values, indices = sae.encode(part)
        place = torch.where(indices < 0, sae.latents, indices).long()
        total.index_add_(0, place.flatten(), values.flatten().double())
    return total[:-1] / len(tokens)


def concept_scores(means: Tensor, weight: Tensor, concept: int) -> Tensor:
    """Share of every latent in all activity of a concept minus its share in the other concepts together, `[M]`."""
    others = torch.arange(len(means), device=means.device) != concept
    rest = (weight[others, None] * means[others]).sum(0) / weight[others].sum()
    first, second = (mean / (mean.sum() + 1e-8) for mean in (means[concept], rest))
    return first - second


def quantile(values: Tensor, q: float) -> Tensor:
    """The quantile of `values` `[M]`, interpolated linearly; of any number of them, which `torch.quantile` is not."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)
