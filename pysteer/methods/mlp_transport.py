"""A transport map that is conditioned on the sample: a small network of the mean of a row's tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, mse_loss

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, check_pair, register, tokens_of

Weights = list[tuple[Tensor, Tensor]]


@register
@dataclass(frozen=True)
class MLPTransport(Method):
    """`y = x + s N(m)` for every token of a row, with m the mean over its tokens (op `mlp_shift`).

    N is a network D -> hidden -> hidden -> D with GELU, trained with Adam on the pairs of row means to give target -
    source; its last layer starts at zero, so that an untrained one changes nothing. Inputs and outputs are scaled to
    unit mean square while it learns. Negatives are rows whose shift is zero. Every row counts the same, the whole set
    is one batch, gradients are clipped to length 1, and training ends when the loss has not fallen for `patience`
    epochs.

    The published form gives the place instead of the shift (`residual=False`: `N(m) - m`), so that it has to learn the
    identity and at first moves everything to zero.

    Args:
        hidden: width of the two hidden layers.
        residual: whether the network gives the shift.
        epochs, patience, lr, weight_decay: of the training.
    """

    name: ClassVar[str] = "mlp_transport"

    hidden: int = 128
    residual: bool = True
    epochs: int = 1000
    patience: int = 50
    lr: float = 1e-2
    weight_decay: float = 1e-5

    def __post_init__(self) -> None:
        for what in ("hidden", "epochs", "patience"):
            if type(getattr(self, what)) is not int or getattr(self, what) < 1:
                raise InputError(f"{what} of mlp_transport", value=getattr(self, what), allowed="a number above 0")
        if not self.lr > 0 or not self.weight_decay >= 0:
            value = f"{self.lr}, {self.weight_decay}"
            raise InputError("lr and weight_decay", value=value, allowed="above 0, and 0 or more")

    @property
    def pooled(self) -> bool:
        return True

    @property
    def op(self) -> str:
        return "mlp_shift"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        return {
            "first": ("H", "D"),
            "first_bias": ("H",),
            "second": ("H", "H"),
            "second_bias": ("H",),
            "third": ("D", "H"),
            "third_bias": ("D",),
        }

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; only pairs tell what belongs to what."""
        if not paired:
            raise InputError("samples of mlp_transport", value="unpaired", allowed="pairs", fix="use affine_transport")
        x = tokens_of(source, "source", pooled=True)
        y = tokens_of(target, "target", pooled=True)
        others = None if negatives is None else tokens_of(negatives, "negative", pooled=True)
        check_pair(x, y, others, paired)
        if others is not None:
            x, y = torch.cat((x, others)), torch.cat((y, others))
        wanted = y - x if self.residual else y
        scales = [float(each.square().mean().sqrt()) or 1.0 for each in (x, wanted)]
        with torch.enable_grad(), torch.inference_mode(False):
            layers = self._train(x.clone() / scales[0], wanted.clone() / scales[1], seed)
        (first, b1), (second, b2), (third, b3) = layers
        tensors = {"first": first / scales[0], "first_bias": b1, "second": second, "second_bias": b2}
        tensors |= {"third": third * scales[1], "third_bias": b3 * scales[1]}
        return SiteFit(tensors, {} if self.residual else {"residual": False})

    def _train(self, x: Tensor, y: Tensor, seed: int) -> Weights:
        """The layers with the smallest loss."""
        layers = list(_start((x.shape[1], self.hidden, self.hidden, x.shape[1]), seed, x.device))
        parameters = [each.requires_grad_() for layer in layers for each in layer]
        optimiser = torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        best, since, kept = float("inf"), 0, [each.detach().clone() for each in parameters]
        for _ in range(self.epochs):
            loss = mse_loss(_network(layers, x), y)
            value = float(loss.detach())
            since = 0 if value < best else since + 1
            if value < best:
                best, kept = value, [each.detach().clone() for each in parameters]
            if since >= self.patience or value == 0.0:
                break
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        return list(zip(kept[::2], kept[1::2], strict=True))


def _start(sizes: tuple[int, ...], seed: int, device: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights and biases as torch starts linear layers, the last ones zero."""
    generator = torch.Generator().manual_seed(seed)
    for number, (inner, outer) in enumerate(pairwise(sizes)):
        reach = 0.0 if number == len(sizes) - 2 else inner**-0.5
        weight, bias = (reach * (2 * torch.rand(*size, generator=generator) - 1) for size in ((outer, inner), (outer,)))
        yield weight.to(device), bias.to(device)


def _network(layers: Weights, x: Tensor) -> Tensor:
    for number, (weight, bias) in enumerate(layers):
        x = torch.nn.functional.linear(gelu(x) if number else x, weight, bias)
    return x
