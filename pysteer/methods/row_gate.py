"""A gate per row: steer a prompt only when it belongs to the class that the steering was fitted for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.methods.base import tokens_of
from pysteer.methods.statistics import BayesPrecision
from pysteer.ops.linear_gate import linear_gate

_FILE, _CONFIG = "gate.safetensors", "gate.json"


@dataclass(frozen=True)
class RowGate:
    """Linear discriminant (GDA with one covariance, uniform prior) on one vector per row.

    Logits are `x' Q m_c - m_c' Q m_c / 2` with `Q = [cov + tr(cov) / (n - 1) I]^-1`, the same ridge as the Bayes
    precision of the Mahalanobis distance (`Q = (n - 1) / d P`), scaled so that the probabilities are calibrated.

    Attributes:
        weight: `[C, D]` fp32; class 0 is the source.
        bias: `[C]` fp32.
        threshold: the gate opens where P(source) >= threshold.
    """

    weight: Tensor
    bias: Tensor
    threshold: float = 0.5

    @classmethod
    def fit(cls, source: Tensor, others: Tensor | Sequence[Tensor], *, threshold: float = 0.5) -> "RowGate":
        """Fit from rows that should pass and rows that should not.

        Args:
            source: `[N, D]` pooled vectors, or `[N, L, D]` activations that are averaged over their tokens.
            others: the same for the rest; a list gives each of its classes a mean of its own, which matters when they
                do not lie together.
            threshold: in (0, 1).

        Raises:
            InputError: widths differ, NaN or infinite values, a threshold outside (0, 1).
        """
        if not 0.0 < threshold < 1.0:
            raise InputError("threshold of the row gate", value=threshold, allowed="a number between 0 and 1")
        rest = [others] if isinstance(others, Tensor) else list(others)
        if not rest:
            raise InputError("other classes of the row gate", value="none", allowed="at least one")
        classes = [tokens_of(source, "source", pooled=True)]
        classes += [tokens_of(other, "other", pooled=True) for other in rest]
        for rows in classes[1:]:
            if rows.shape[1] != classes[0].shape[1]:
                raise InputError("width of the other classes", value=rows.shape[1], allowed=f"{classes[0].shape[1]}")
        means = torch.stack([rows.double().mean(0) for rows in classes])
        residuals = torch.cat([rows.double() - mean for rows, mean in zip(classes, means, strict=True)])
        precision = BayesPrecision.fit(residuals)
        middle = means.mean(0)  # logits relative to the middle of the classes lose less to rounding
        relative = means - middle
        weight = precision.apply(relative) * max(len(residuals) - 1, 1) / residuals.shape[1]
        bias = -(weight @ middle) - (weight * relative).sum(1) / 2
        return cls(weight.float(), bias.float(), float(threshold))

    def probability(self, x: Tensor) -> Tensor:
        """P(source) of each row, `[R]` fp32, for `x` `[R, D]` or `[R, L, D]` (averaged over its tokens)."""
        if x.shape[-1] != self.weight.shape[1]:
            raise InputError("width of the rows to gate", value=x.shape[-1], allowed=str(self.weight.shape[1]))
        return linear_gate(x, self.weight.to(x.device), self.bias.to(x.device))

    def __call__(self, x: Tensor) -> Tensor:
        """1.0 where the row passes, else 0.0; `[R]` fp32, ready for `handle.gate`."""
        return (self.probability(x) >= self.threshold).float()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `gate.safetensors` and `gate.json` into `folder`."""
        files.write_safetensors(Path(folder) / _FILE, {"weight": self.weight, "bias": self.bias})
        files.write_json(Path(folder) / _CONFIG, {"format": "pysteer-row-gate-1", "threshold": self.threshold})
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RowGate":
        """Read what `save_pretrained` wrote; InputError when a file is missing, damaged or does not fit."""
        config = files.read_json(Path(folder) / _CONFIG, "row gate configuration")
        threshold = config.get("threshold") if isinstance(config, dict) else None
        if not isinstance(threshold, float) or not math.isfinite(threshold) or not 0 < threshold < 1:
            raise InputError("threshold of the row gate", value=threshold, allowed="a number between 0 and 1")
        tensors, _ = files.read_safetensors(Path(folder) / _FILE, "row gate")
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is None or bias is None or weight.dim() != 2 or tuple(bias.shape) != (len(weight),):
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise InputError("tensors of the row gate", value=str(shapes), allowed="weight [C, D] and bias [C]")
        return cls(weight.float(), bias.float(), threshold)
