"""What a plan does at a site, as one map `A x + c` with A diagonal plus low rank; anything else is refused."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.steering.plan import PlanEntry, SiteParameters

_TENSORS = {  # of the ops that are affine maps
    "affine_shift": {"gain", "bias"},
    "low_rank_shift": {"read", "write", "bias"},
    "sae_edit": {"encoder", "encoder_bias", "decoder", "scale", "add"},
}
_REASONS = {  # what makes an entry more than one map for all tokens, and what can be done about it
    "bounds": ("only values within a support are shifted", "fit with support 'all', or steer instead"),
    "of_mean": ("the shift is that of the mean of a map", "fit with of_mean=False, or steer instead"),
    "gate": ("a gate decides for every row or token", "leave out the gate, or steer instead"),
    "keep_norm": ("every token keeps its length", "leave out keep_norm, or steer instead"),
    "prototype_shift": ("prototypes shift every token by its own", "fit MeanDifference, or steer instead"),
    "gradient_shift": ("the gradient differs from token to token", "steer instead"),
}


def refusal(site: str, why: str, fix: str = "leave the site out, or steer instead") -> InputError:
    """The error that says why a site cannot be folded, and what to do."""
    return InputError(f"site {site} cannot be folded", value=why, allowed="see pysteer.bake", fix=fix)


@dataclass(frozen=True)
class AffineMap:
    """`y = gain ⊙ x + writeᵀ (read x) + shift`, all fp64.

    Attributes:
        gain, shift: `[D]`.
        read, write: `[r, D]`.
    """

    gain: Tensor
    read: Tensor
    write: Tensor
    shift: Tensor

    @classmethod
    def diagonal(cls, gain: Tensor, shift: Tensor) -> "AffineMap":
        """`gain ⊙ x + shift`, both `[D]`."""
        none = gain.new_zeros(0, len(gain))
        return cls(gain, none, none, shift)

    @cached_property
    def shifts(self) -> bool:
        """Whether 0 is moved."""
        return bool((self.shift != 0).any())

    @cached_property
    def scales(self) -> bool:
        """Whether a channel is multiplied."""
        return bool((self.gain != 1).any())

    @property
    def mixes(self) -> bool:
        """Whether a channel depends on another one."""
        return len(self.read) > 0

    @property
    def only_shifts(self) -> bool:
        """Whether the same vector is added to every token."""
        return not (self.scales or self.mixes)

    @property
    def does_nothing(self) -> bool:
        return self.only_shifts and not self.shifts

    def to(self, device: torch.device) -> "AffineMap":
        return AffineMap(*(part.to(device) for part in (self.gain, self.read, self.write, self.shift)))

    def linear(self, x: Tensor) -> Tensor:
        """`A x` for the vectors of `x` `[..., D]`, without the shift."""
        return self.gain * x + (x @ self.read.T) @ self.write

    def scaled(self, factor: float) -> "AffineMap":
        """The map between `x` and `y` both multiplied by `factor`."""
        return AffineMap(self.gain, self.read, self.write, factor * self.shift)

    def then(self, other: "AffineMap") -> "AffineMap":
        """This map, and `other` behind it."""
        return AffineMap(
            other.gain * self.gain,
            torch.cat((self.read, other.read * self.gain)),
            torch.cat((other.linear(self.write), other.write)),
            other.linear(self.shift) + other.shift,
        )


def map_of(entry: PlanEntry, steps: int, strength: float, both: bool) -> AffineMap:
    """The map of an entry that is the same at every step, and for cond and uncond rows if there are `both`.

    Raises:
        InputError: it is not one affine map; names the site, the reason and the fix.
    """
    parameters = entry.parameters
    _check_op(parameters)
    found: list[AffineMap] = []
    for cond, uncond, which in dict.fromkeys((*entry.at(step), _set_at(parameters, step)) for step in range(steps)):
        if both and cond != uncond:
            raise refusal(parameters.site, "different strengths for cond and uncond rows", 'use rows="both"')
        found.append(_at(parameters, which, cond * strength))
        same = (getattr(found[0], name).equal(getattr(found[-1], name)) for name in ("gain", "read", "write", "shift"))
        if not all(same):
            raise refusal(
                parameters.site, "parameters or strengths that change with the step", "one schedule for all steps"
            )
    return found[0]


def _check_op(parameters: SiteParameters) -> None:
    """Refuse whatever is not `A x + c` with the same A and c for all tokens."""
    op, options = parameters.op, {name: value for name, value in parameters.options.items() if value}
    gate = options.pop("gate", "none") != "none" or any(name.startswith("gate.") for name in options)
    extra = {*parameters.tensors, *options} - _TENSORS.get(op, set())
    reason = "" if op in _TENSORS and not extra and not gate else op
    if op in _TENSORS:
        reason = "gate" if gate else "bounds" if extra & {"low", "high"} else next(iter(sorted(extra)), "")
    if reason:
        why, fix = _REASONS.get(reason, (f"no affine map, because of {reason}", "steer instead"))
        raise refusal(parameters.site, f"{op}: {why}", fix)


def _set_at(parameters: SiteParameters, step: int) -> int:
    """Which parameter set serves a step; -1 for none."""
    if parameters.steps is None:
        return 0
    return parameters.steps.index(step) if step in parameters.steps else -1


def _at(parameters: SiteParameters, which: int, s: float) -> AffineMap:
    banks = {name: bank[which].double() for name, bank in parameters.tensors.items()}
    width = next(bank.shape[-1] for bank in banks.values() if bank.dim() == max(b.dim() for b in banks.values()))
    if which < 0 or s == 0:
        return AffineMap.diagonal(torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    if parameters.op == "affine_shift":
        return AffineMap.diagonal(1 + s * (banks["gain"] - 1), s * banks["bias"])
    if parameters.op == "low_rank_shift":
        read, write, bias = banks["read"], banks["write"], banks["bias"]
    else:
        factor = banks["scale"] - 1
        read, write = banks["encoder"], factor[:, None] * banks["decoder"]
        bias = (factor * banks["encoder_bias"] + banks["add"]) @ banks["decoder"]
    used = (read != 0).any(-1) & (write != 0).any(-1)  # ranks that differ between steps are filled up with zeros
    return AffineMap(torch.ones(width, dtype=torch.float64), read[used], s * write[used], s * bias)
