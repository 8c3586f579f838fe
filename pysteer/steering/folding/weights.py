"""The weights of one module, changed by maps: of what it gives out, of what it takes in, or of a modulation."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.steering.folding.maps import AffineMap, refusal

Factors = tuple[Tensor, Tensor]  # up [out, r] and down [r, in]: up @ down is added to a weight
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def plain_class(module: nn.Module) -> type:
    """The class of a module, or of the one that steering put its own on top of."""
    return getattr(type(module), "_steer_base", type(module))


def class_name(module: nn.Module) -> str:
    return plain_class(module).__name__


def is_linear(module: nn.Module | None) -> bool:
    """Whether the module is a matrix and a bias: a linear layer or a convolution, that of GPT-2 too."""
    return module is not None and (plain_class(module) in _LINEAR or class_name(module) == "Conv1D")


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm with weights."""
    return "norm" in class_name(module).lower() and isinstance(getattr(module, "weight", None), Tensor)


def is_pointwise(module: nn.Module) -> bool:
    """Whether every output token is made of one input token, without zeros from the edge."""
    if plain_class(module) is nn.Linear or class_name(module) == "Conv1D":
        return True
    conv: Any = module
    return is_linear(module) and {*conv.kernel_size, conv.groups} == {1} and set(conv.padding) <= {0, "valid"}


@dataclass
class Matrix:
    """Weight `[out, in]` and bias `[out]` of a linear layer in fp64, and what was added to the weight.

    Attributes:
        weight, bias: as they are by now; without a bias it is 0.
        factors: with `record`, all that was added to the weight, as products.
    """

    module: Any
    record: bool = False
    factors: list[Factors] = field(default_factory=list)

    def __post_init__(self) -> None:
        weight, bias = self.module.weight.detach().to(torch.float64, copy=True), getattr(self.module, "bias", None)
        self.weight = weight.T.contiguous() if class_name(self.module) == "Conv1D" else weight.flatten(1)
        zero = self.weight.new_zeros(len(self.weight))
        self.bias = zero if bias is None else zero + bias.detach()

    def outputs(self, change: AffineMap, rows: slice) -> None:
        """Put a map behind the given outputs: `W' = A W`, `bias' = A bias + c`."""
        before = self.weight[rows]
        self._add(change, before, rows=rows)
        self.weight[rows] = change.linear(before.T).T
        self.bias[rows] = change.linear(self.bias[rows]) + change.shift

    def inputs(self, change: AffineMap, columns: slice) -> None:
        """Put a map before the given inputs: `W' = W A`, `bias' = bias + W c`."""
        before = self.weight[:, columns]
        self._add(change, before, columns=columns)
        self.bias += before @ change.shift
        self.weight[:, columns] = before * change.gain + (before @ change.write.T) @ change.read

    def carry(self, amount: Tensor, source: slice, target: slice) -> None:
        """Add `amount ⊙ (1 + output)` of the rows `source` to the rows `target`."""
        move = torch.diag(amount)[:, amount != 0]
        if self.record:
            up = self.weight.new_zeros(len(self.weight), move.shape[1])
            up[target] = move
            self.factors.append((up, self.weight[source][amount != 0].clone()))
        self.weight[target] += amount[:, None] * self.weight[source]
        self.bias[target] += amount * (1 + self.bias[source])

    def _add(self, change: AffineMap, before: Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        """Keep what a map adds, as factors of the smallest rank."""
        if not self.record:
            return
        out, width = self.weight.shape
        scaled = change.gain != 1
        pick = torch.diag(change.gain - 1)[scaled]
        if rows is not None:
            up = self.weight.new_zeros(out, len(pick) + len(change.read))
            up[rows] = torch.cat((pick, change.write)).T
            down = torch.cat((before[scaled], change.read @ before))
        else:
            down = self.weight.new_zeros(len(pick) + len(change.read), width)
            down[:, columns] = torch.cat((pick, change.read))
            up = torch.cat((before[:, scaled], before @ change.write.T), 1)
        if len(down):
            self.factors.append((up, down))

    def store(self) -> None:
        """Write weight and bias into the module."""
        weight = self.module.weight
        weight.copy_(self.weight.T if class_name(self.module) == "Conv1D" else self.weight.view_as(weight))
        if getattr(self.module, "bias", None) is not None:
            self.module.bias.copy_(self.bias)


@dataclass(frozen=True)
class Edit:
    """A change of the weights of one module.

    Attributes:
        site: the site that asked for it.
        path: of the module.
        change: the map.
        kind: "outputs" or "inputs" of a linear layer, "norm", "embedding", or "modulation", where `change` is put
            behind `x (1 + scale) + shift`, or "normed", where it is put behind x.
        part: rows or columns of the layer's outputs or inputs.
        scale, shift: rows of a modulation.
    """

    site: str
    path: str
    change: AffineMap
    kind: str = "outputs"
    part: slice = field(default_factory=lambda: slice(None))
    scale: slice = field(default_factory=lambda: slice(None))
    shift: slice | None = None

    @property
    def needs_bias(self) -> bool:
        """Whether a layer without a bias would need one."""
        modulated = self.kind in ("modulation", "normed")
        return self.kind != "embedding" and (self.change.shifts or (modulated and self.change.scales))

    def on(self, matrix: Matrix) -> None:
        """Change a linear layer."""
        change = self.change.to(matrix.weight.device)
        if self.kind == "outputs":
            matrix.outputs(change, self.part)
        elif self.kind == "inputs":
            matrix.inputs(change, self.part)
        else:
            if self.shift is not None and self.kind == "normed":
                matrix.carry(change.shift, self.scale, self.shift)
            elif self.shift is not None:
                matrix.outputs(change, self.shift)
            matrix.outputs(AffineMap.diagonal(change.gain, change.gain - 1), self.scale)

    def on_norm(self, module: Any) -> None:
        """Change the weight and the bias of a norm."""
        change = self.change.to(module.weight.device)
        origin = float(norm_origin(module) or 0)
        module.weight.copy_(change.gain * (module.weight.double() + origin) - origin)
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(change.gain * module.bias.double() + change.shift)

    def on_embedding(self, module: Any) -> None:
        """Change the rows of an embedding."""
        change = self.change.to(module.weight.device)
        module.weight.copy_(change.linear(module.weight.double()) + change.shift)


def norm_origin(module: Any) -> int | None:
    """0 for a norm that multiplies by its weight, 1 for one that multiplies by 1 + weight, None for any other."""
    norm, width = copy.deepcopy(module), module.weight.shape[0]  # a copy has nothing attached
    by_channel = hasattr(norm, "num_groups") or class_name(norm).startswith("Batch")
    x = torch.linspace(0, 6, 6 * width, device=norm.weight.device).sin().to(norm.weight.dtype)
    x = x.view((2, width, 3) if by_channel else (2, 3, width))
    values = {}
    with torch.no_grad():
        for weight in (-1, 0, 1):
            norm.weight.fill_(weight)
            if getattr(norm, "bias", None) is not None:
                norm.bias.zero_()
            try:
                values[weight] = norm(x)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                return None
            if not isinstance(values[weight], Tensor) or values[weight].shape != x.shape:
                return None
    unit = values[1].double() - values[0].double()
    for origin in (0, 1):
        same = (torch.allclose(y.double(), (weight + origin) * unit, 2e-2, 2e-2) for weight, y in values.items())
        if bool(unit.any()) and all(same):
            return origin
    return None


def check_weights(site: str, module: Any, sharing: list[str]) -> None:
    """Refuse weights that cannot be changed for this site alone, or at all.

    Raises:
        InputError: names the site and why.
    """
    weight = getattr(module, "weight", None)
    if hasattr(module, "base_layer"):
        raise refusal(site, "an adapter on the layer", "merge it into the weights first")
    if hasattr(module, "parametrizations"):
        raise refusal(site, "parametrized weights", "remove the parametrization first")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.itemsize < 2:
        raise refusal(site, "quantised weights", "load the model without quantisation")
    if weight.is_meta:
        raise refusal(site, "weights that are not in memory", "load the model without offloading")
    if len(sharing) > 1:
        raise refusal(site, f"weights shared by {', '.join(sharing)}", "untie them first")


def check_width(site: str, width: int, change: AffineMap) -> None:
    """Refuse parameters of another width than the weights have.

    Raises:
        InputError: names the site and both widths.
    """
    if len(change.gain) != width:
        raise refusal(site, f"parameters of width {len(change.gain)} for weights of width {width}", "fit them again")
