"""What a method is, and the registry that gives each one its name, its configuration and its save format."""

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops.channel_moments import ChannelMoments


class SiteFit(NamedTuple):
    """Parameters of one site at one step: `tensors` are fp32 and named as the op's bank arguments, without the leading
    parameter-set dimension; `options` are the static options of the op; `shared` are tensors that all steps share."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    shared: Mapping[str, Tensor] = MappingProxyType({})


class TokenSets(NamedTuple):
    """What `Method.fit_site` is given: `[N, L, D]`, or `[1, n, D]` where rows have different numbers of tokens."""

    source: Tensor
    target: Tensor
    negatives: Tensor | None


class Method(ABC):
    """How steering parameters are fitted from activations, and which op applies them.

    A method is a frozen dataclass: its fields are the configuration, checked when it is made. It is registered under
    `name` with `@register`.

    Attributes:
        name: the name in the registry and in saved folders.
    """

    name: ClassVar[str]

    @property
    def pooled(self) -> bool:
        """Whether each row enters the fit as the mean over its tokens; most methods have a field of this name."""
        return False

    @property
    def needs_rows(self) -> bool:
        """Whether `fit_site` wants the means over the tokens of each row as well, as its argument `rows`."""
        return False

    def options_of_layout(self, layout: str) -> dict[str, Any]:
        """Options that a site of this layout adds to those of the fit."""
        return {}

    @property
    @abstractmethod
    def op(self) -> str:
        """Name of the op in `pysteer.ops` that applies the parameters."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[str, ...]]:
        """Tensors of the op's bank with their dimensions: "D" is the width, "1" is one, other letters any size."""

    @abstractmethod
    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """Fit one site at one step.

        Args:
            source: activations to be changed, `[N, L, D]` (or tokens `[n, D]`), any floating dtype.
            target: activations they should come to resemble, `[M, L, D]` or `[m, D]`; when `paired`, token i of row r
                belongs to token i of source row r (same noise, prompts that differ in one word).
            negatives: activations that should stay as they are, `[*, L, D]` or `[*, D]`; None for none.
            paired: whether source and target tokens correspond one to one.
            seed: seed of every random choice in the fit; the same seed gives the same parameters.

        Returns:
            fp32 parameters and the op's options.

        Raises:
            InputError: shapes that do not fit together, NaN or infinite values, an unsupported combination.
        """

    def fit_moments(self, source: ChannelMoments, target: ChannelMoments) -> SiteFit:
        """Fit one site at one step from count, mean, variance and range of every unit alone.

        Raises:
            InputError: the method needs the activations themselves.
        """
        raise InputError(
            f"{self.name} from moments",
            value="means and variances alone",
            allowed="mean_difference, gaussian_transport",
            fix="capture the activations",
        )

    def config(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the method from `config`; an unknown key is an InputError that names the closest one."""
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in config:
            if key not in names:
                raise InputError(
                    f"unknown option of method {cls.name}",
                    value=key,
                    allowed=", ".join(names),
                    fix=did_you_mean(key, names),
                )
        try:
            return cls(**config)
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"options of method {cls.name} ({error})", value=str(dict(config))[:200]) from error


REGISTRY: dict[str, type[Method]] = {}
_MethodType = TypeVar("_MethodType", bound=type[Method])


def register(cls: _MethodType) -> _MethodType:
    """Class decorator: put a method into the registry under its `name`."""
    if cls.name in REGISTRY and REGISTRY[cls.name].__qualname__ != cls.__qualname__:
        raise InputError("method name is taken", value=cls.name, fix="choose another name")
    REGISTRY[cls.name] = cls
    return cls


def create(name: str, **config: Any) -> Method:
    """Make the method `name` with the given configuration."""
    if name not in REGISTRY:
        raise InputError("unknown method", value=name, allowed=", ".join(REGISTRY), fix=did_you_mean(name, REGISTRY))
    return REGISTRY[name].from_config(config)


def did_you_mean(given: object, allowed: Any) -> str:
    """ "did you mean X" for the entry of `allowed` closest to `given`; empty when nothing is close."""
    close = difflib.get_close_matches(str(given), [str(item) for item in allowed], n=1)
    return f"did you mean {close[0]}" if close else ""


def check_choice(what: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise an InputError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise InputError(what, value=value, allowed=", ".join(allowed), fix=did_you_mean(value, allowed))


def tokens_of(x: Tensor, what: str, *, pooled: bool = False) -> Tensor:
    """Activations `[N, L, D]` or `[n, D]` as fp32 tokens `[n, D]`; `pooled` averages each row over its tokens."""
    if not isinstance(x, Tensor) or x.dim() not in (2, 3) or 0 in x.shape or not x.is_floating_point():
        got = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{what} activations", value=got, allowed="floating point [N, L, D] or [n, D], not empty")
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"{what} activations", value="NaN or infinity", allowed="finite values")
    if pooled and x.dim() == 3:
        x = x.float().mean(dim=1)
    return x.detach().reshape(-1, x.shape[-1]).float()


def check_pair(source: Tensor, target: Tensor, negatives: Tensor | None, paired: bool) -> None:
    """Raise an InputError unless the token sets `[n, D]` fit together."""
    for what, other in (("target", target), ("negative", negatives)):
        if other is not None and other.shape[1] != source.shape[1]:
            raise InputError(
                f"width of the {what} activations", value=other.shape[1], allowed=f"{source.shape[1]}, as the source"
            )
    if paired and source.shape != target.shape:
        raise InputError(
            "paired source and target tokens",
            value=f"{len(source)} and {len(target)}",
            allowed="equal numbers",
            fix="pass the same number of rows and tokens, or paired=False",
        )
