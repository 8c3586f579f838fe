"""One call of a steering op as a plan wants it: behind a gate, and with the length of every token kept if asked for.

Both stand around the op, so every method has them. What they need is among the parameters of a site: tensors whose
names begin with `gate.` and the options `gate.kind`, `gate.threshold`, `gate.per_token` are those of `linear_gate`, and
the option `keep_norm` scales every token that was changed back to the length it had.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.ops import registry
from pysteer.ops.linear_gate import linear_gate, linear_gate_reference
from pysteer.ops.lookup import active_tokens, laid_out_like, look_up
from pysteer.ops.prepared import Prepared

GATE = "gate."
GATE_TENSORS = {"gda": ("weight", "bias"), "ood": ("weight", "bias", "factor", "scale"), "min_max": ("weight",)}
AROUND = ("gate.kind", "gate.threshold", "gate.per_token", "keep_norm")  # options that are not the op's own


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors or options of the op itself, and those of its gate without the prefix."""
    own = {name: value for name, value in values.items() if not name.startswith(GATE)}
    return own, {name.removeprefix(GATE): value for name, value in values.items() if name.startswith(GATE)}


def _never(*arguments: Any) -> None:
    """What stands around an op takes more than one call of a kernel."""
    return


@dataclass
class Call:
    """An op with its banks, and what goes around it.

    Attributes:
        op: with its banks, tensors that all sets share, and options.
        gate: banks of the gate, `[P, ...]`; empty for none.
        gate_options: kind, threshold and per_token.
        keep_norm: whether tokens keep their length.
        shared: whether all rows that are on use the same set at any one step.
        alone: whether nothing goes around the op.
        again: `Prepared.again` then.
    """

    op: Prepared
    gate: dict[str, Tensor]
    gate_options: dict[str, Any]
    keep_norm: bool
    shared: bool
    channel_dim: int

    def __post_init__(self) -> None:
        self.alone = not self.gate and not self.keep_norm
        self.again: Callable[..., Tensor | None] = self.op.again if self.alone else _never

    @classmethod
    def make(
        cls,
        op: str,
        bank: Mapping[str, Tensor],
        options: Mapping[str, Any],
        layout: str,
        *,
        common: Mapping[str, Tensor] | None = None,
        shared: bool = True,
    ) -> "Call":
        """From the parameters of a site; `common` are the tensors that all sets share."""
        own, gate = split(bank)
        own_options, gate_options = split(options)
        keep_norm = bool(own_options.pop("keep_norm", False))
        channel_dim = 1 if layout == "channels" else -1
        given = {**own, **(common or {}), **own_options, "channel_dim": channel_dim}
        prepared = Prepared(registry.get(op).function, given)
        return cls(prepared, gate, gate_options, keep_norm, shared, channel_dim)

    def __call__(
        self, x: Tensor, slot: Tensor, strength: Tensor, clock: Tensor, span: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """Steer `x`; the gate looks at the tokens in `span` `[Rcap, 2]` and, of `[R, L]` tokens, those in `mask`."""
        if self.alone:
            return self.op(x, slot, strength, clock, span)
        gate, soft = None, False
        if self.gate:
            gate = self._open(x.detach(), slot, clock, None if span is None else span[: len(x)], mask)
            soft = self.gate_options["kind"] == "gda" and self.gate_options.get("threshold") is None
            if not self.gate_options.get("per_token", False):  # an op is linear in its strength
                room = torch.nn.functional.pad(gate, (0, slot.shape[1] - len(x)))
                strength, gate = torch.where(strength == 0, strength, strength * room), None
        if gate is None and not self.keep_norm:
            return self.op.whole(x, slot, strength, clock, span)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) if soft or self.keep_norm else x
        y = self.op.whole(wide, slot, strength, clock, span)
        which, s = look_up(slot, strength, clock, len(x))
        touched = active_tokens(x, which, s, span, self.channel_dim)
        if gate is not None:
            gate = gate.unsqueeze(self.channel_dim)
            touched = touched & (gate > 0)
            y = wide + gate * (y - wide) if soft else y
        if self.keep_norm:
            before, after = (each.norm(dim=self.channel_dim, keepdim=True) for each in (wide, y))
            y = y * (before / after.clamp_min(torch.finfo(y.dtype).tiny))
        return laid_out_like(torch.where(touched, y.to(x.dtype), x), x)

    @torch.no_grad()
    def _open(self, x: Tensor, slot: Tensor, clock: Tensor, span: Tensor | None, mask: Tensor | None) -> Tensor:
        """The gate of every row `[R]`, or of every token."""
        options: dict[str, Any] = {**self.gate_options, "channel_dim": self.channel_dim}
        now = slot.index_select(0, clock.reshape(1))[0]
        if self.shared:
            options |= {name: bank.index_select(0, now.amax().reshape(1))[0] for name, bank in self.gate.items()}
            return linear_gate(x, span=span, mask=mask, **options)
        rows = {name: bank.index_select(0, now[: len(x)]) for name, bank in self.gate.items()}
        rows |= {name: each.unsqueeze(1) for name, each in (("span", span), ("mask", mask)) if each is not None}

        def of_row(x: Tensor, row: dict[str, Any]) -> Tensor:
            return linear_gate_reference(x, **row, **options)[0]

        return torch.vmap(of_row)(x.unsqueeze(1), rows)
