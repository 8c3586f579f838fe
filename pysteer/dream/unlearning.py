"""Unlearning a concept with a sparse autoencoder (SAeUron, Cywinski and Deja 2025), from statistics that are streamed.

What the method needs of C concepts is the mean of every latent at every step, `[C, S, M]`: it is added up row by row
and no latent of a prompt is kept. At each step the latents whose share of the concept's activity exceeds that of the
others by more than the percentile are multiplied by `factor mu_j` wherever they are above their mean over the concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.capture.taps import PartRows, tapped
from pysteer.dream.features import Features
from pysteer.errors import InputError
from pysteer.methods.base import SiteFit
from pysteer.methods.sae_steering import SAESteering
from pysteer.steering.plan import Plan, SiteParameters
from pysteer.steering.site import Site


@dataclass
class ConceptMeans:
    """Means of all latents by concept and step.

    Attributes:
        names: of the C concepts.
        total: sums over rows of the means over their tokens, fp64 `[C, S, M]`.
        rows: rows of every concept, `[C]`.
    """

    names: tuple[str, ...]
    total: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, names: Sequence[str], steps: int, latents: int) -> ConceptMeans:
        """No rows yet."""
        shape = (len(names), steps, latents)
        return cls(tuple(names), torch.zeros(shape, dtype=torch.float64), torch.zeros(len(names), dtype=torch.int64))

    @property
    def means(self) -> Tensor:
        """`[C, S, M]` fp64."""
        return self.total / self.rows.clamp_min(1)[:, None, None]

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        files.write_safetensors(path, {"total": self.total, "rows": self.rows}, {"names": "\n".join(self.names)})

    @classmethod
    def load(cls, path: Path) -> ConceptMeans:
        """Read what `save` wrote."""
        tensors, meta = files.read_safetensors(path, "means of concepts")
        return cls(tuple(meta["names"].split("\n")), tensors["total"], tensors["rows"])


def add_rows(
    found: ConceptMeans,
    pipe: Any,
    features: Features,
    prompts: Sequence[str],
    concepts: Sequence[int],
    seeds: Sequence[int],
    settings: dict[str, Any],
) -> None:
    """Run prompts as one batch and add their conditional rows.

    Args:
        found: what is added to.
        pipe: an `ImageGenerator`.
        features: latents of the site.
        prompts, concepts, seeds: of every row.
        settings: arguments of the pipeline.
    """
    seen: set[int] = set()
    place = torch.tensor(list(concepts))

    def see(_: Site, step: int, x: Tensor, rows: PartRows) -> Tensor:
        part = x.detach()[rows.cond_rows]
        if len(part) and step not in seen:
            seen.add(step)
            found.total[:, step].index_add_(0, place, features.means(part).double().cpu())
        return x

    with torch.no_grad(), tapped(pipe, [features.site], see):
        pipe(list(prompts), seeds=list(seeds), decode=False, **settings)
    found.rows += torch.bincount(place, minlength=len(found.rows))


def unlearning_plan(
    found: ConceptMeans,
    features: Features,
    concept: str,
    *,
    percentile: float = 99.99,
    factor: float = -1.0,
    floor: float = 1.0,
    rows: str = "both",
    error: str = "keep",
) -> Plan:
    """What unlearns a concept.

    Args:
        found: means of all concepts.
        features: latents of the site.
        concept: its name.
        percentile: of the scores of all latents at a step; those above are edited.
        factor: gamma, what they are multiplied by besides their mean in the concept; usually negative.
        floor: from which multiple of its mean over the concepts a latent is edited; 1 in the paper. More spares
            concepts that share a latent with this one and activate it less.
        rows: "cond", "uncond" or "both"; both in the paper.
        error: "keep", or "saeuron" for the published hook.

    Raises:
        InputError: an unknown concept, or features that are no latents.
    """
    if concept not in found.names:
        raise InputError("concept to unlearn", value=concept, allowed=", ".join(found.names))
    if features.sae is None:
        raise InputError("unlearning", value="raw channels", allowed="latents of an autoencoder")
    method = SAESteering(
        sae=features.sae, mode="unlearn", values=(factor,), percentile=percentile, floor=floor, error=error
    )
    number, weight = found.names.index(concept), found.rows.double()
    fits = [method.unlearn(features.sae, found.means[:, step], weight, number) for step in range(found.total.shape[1])]
    return Plan.build([_of_steps(features.site.name, method.op, fits)], rows=rows)


def _of_steps(site: str, op: str, fits: Sequence[SiteFit]) -> SiteParameters:
    """One parameter set per step; a step with fewer latents is filled up with edits that do nothing."""
    most = max(len(fit.tensors["scale"]) for fit in fits)
    tensors: dict[str, list[Tensor]] = {}
    for fit in fits:
        missing = most - len(fit.tensors["scale"])
        for name, tensor in fit.tensors.items():
            blank = tensor.new_zeros(missing, *tensor.shape[1:])
            if name == "scale":
                blank = blank + 1  # a factor of 1
            tensors.setdefault(name, []).append(torch.cat((tensor, blank)) if missing else tensor)
    stacked = {name: torch.stack(each) for name, each in tensors.items()}
    return SiteParameters(site, op, tuple(range(len(fits))), stacked, dict(fits[0].options), dict(fits[0].shared))


def edited_latents(plan: Plan) -> list[list[int]]:
    """The latents that a plan edits, by step."""
    (entry,) = plan.entries
    return [sorted(set(each)) for each in entry.parameters.tensors["latent"].tolist()]
