"""How others steer, written from their formulas: what each does per call is what makes it cost what it costs.

Functions make forward hooks `hook(module, args, output)`, which return the steered output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Hook = Callable[[nn.Module, Any, Any], Any]
Lever = list[float]  # a strength that can be changed: one Python float, as all of these have it


def first(output: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """The activation of an output that may be a tuple, and the rest of it."""
    return (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, ())


def again(x: Tensor, rest: tuple[Any, ...]) -> Any:
    """An output of the same form."""
    return (x, *rest) if rest else x


def add(vector: Tensor, strength: Lever) -> Hook:
    """x + s v: the least that a hook can do, and the plain formula that all mean shifts are held against."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x, rest = first(output)
        return again(x + strength[0] * vector, rest)

    return hook


def affine(gain: Tensor, bias: Tensor, strength: Lever) -> Hook:
    """x + s ((g - 1) x + b), the plain formula of diagonal maps."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x, rest = first(output)
        return again(x + strength[0] * ((gain - 1) * x + bias), rest)

    return hook


def channels(vector: Tensor, strength: Lever) -> Hook:
    """x + s v for images `[B, C, H, W]`."""
    shaped = vector.view(1, -1, 1, 1)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x, rest = first(output)
        return again(x + strength[0] * shaped, rest)

    return hook


def linear_act(gain: Tensor, bias: Tensor, low: Tensor, high: Tensor, strength: Lever) -> Hook:
    """ml-act, Linear-AcT: g (s T(z) + (1 - s) z) + (1 - g) z with g = 1[low < z < high], cast to fp32 and back."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x, rest = first(output)
        z = x.to(torch.float32)
        inside = ((z > low) & (z < high)).to(z.dtype)
        moved = gain * z + bias
        blended = strength[0] * moved + (1 - strength[0]) * z
        return again((inside * blended + (1 - inside) * z).to(x.dtype), rest)

    return hook


def gaussian_act(gain: Tensor, bias: Tensor, low: Tensor, high: Tensor, strength: Lever) -> Hook:
    """ml-act, Gaussian transport: (z - m1) / s1 s2 + m2 on the units that live, picked by a boolean mask.

    The map is given as a gain and a bias; with m1 = 0 and s1 = 1 they are s2 and m2.
    """
    mean1, std1, std2, mean2 = torch.zeros_like(gain), torch.ones_like(gain), gain, bias
    lives = (std1 > 1e-4) & (std2.abs() > 1e-4)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x, rest = first(output)
        z = x.to(torch.float32)
        moved = z.clone()
        moved[..., lives] = (z[..., lives] - mean1[lives]) / std1[lives] * std2[lives] + mean2[lives]
        blended = strength[0] * moved + (1 - strength[0]) * z
        inside = ((z > low) & (z < high)).to(z.dtype)
        return again((inside * blended + (1 - inside) * z).to(x.dtype), rest)

    return hook


class RepengBlock(nn.Module):
    """repeng: a module around a block. It takes the norm of the activation and makes a mask of the positions at every
    call, whether they are used or not."""

    def __init__(self, block: nn.Module, vector: Tensor, strength: Lever, normalize: bool = False) -> None:
        super().__init__()
        self.block, self.vector, self.strength, self.normalize = block, vector, strength, normalize

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the model asks of its layers, such as the kind of their attention
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block, and the vector on the tokens from the first position of each row on."""
        x, rest = first(self.block(*args, **kwargs))
        before = x.norm(dim=-1, keepdim=True)
        control = (self.strength[0] * self.vector).to(x.dtype).view(1, 1, -1)
        places = kwargs.get("position_ids")
        if places is not None:
            start = (places == 0).cumsum(1).argmax(1, keepdim=True)
            behind = torch.arange(places.shape[1], device=x.device) >= start
            control = control * behind.to(x.dtype).unsqueeze(-1)
        steered = x + control
        if self.normalize:
            steered = steered / steered.norm(dim=-1, keepdim=True) * before
        return again(steered, rest)


class InfinityWrapper(nn.Module):
    """The steering wrapper around a module of the published Infinity (conditional activation transport).

    The step is a Python number; the schedule is looked up in a dict by its text; vectors are moved and cast at every
    call; cond and uncond rows are written into the output one after the other.

    Args:
        layer: the wrapped module.
        number: of the layer.
        state: `step`, the current scale.
        schedule: text of a scale -> layers that are steered.
        vectors: (scale, layer) -> vector.
        strength: of both halves of the rows.
    """

    def __init__(
        self, layer: nn.Module, number: int, state: dict[str, int], schedule: dict[str, list[int]],
        vectors: dict[tuple[int, int], Tensor], strength: Lever,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer, self.number, self.state = layer, number, state
        self.schedule, self.vectors, self.strength = schedule, vectors, strength

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, changed in place."""
        out = self.layer(*args, **kwargs)
        step = self.state["step"]
        layers = self.schedule.get(str(step))
        if layers is None or self.number not in set(layers) or self.strength[0] == 0:
            return out
        half = len(out) // 2
        for part in (slice(None, half), slice(half, None)):
            x = out[part]
            vector = self.vectors[(step, self.number)].to(x.device).to(x.dtype)
            touched = torch.ones(len(x), dtype=torch.bool, device=x.device)  # its conditions are masks of rows
            if touched.any():
                steered = x.clone()
                steered[touched] = x[touched] + self.strength[0] * vector
                out[part] = steered
        return out


class SaeuronEdit:
    """SAeUron: the hook that unlearns, `x + D(edited) - D(latents)` with the error of the autoencoder kept.

    All latents are encoded, the k largest are kept by a scatter into a dense tensor, the chosen ones are multiplied
    where they exceed their level, and both are decoded with all M directions.

    Args:
        encoder, encoder_bias: `[M, D]`, `[M]`.
        decoder: `[M, D]`.
        k: latents kept per token.
        chosen: indices of the edited latents.
        scale: factors of the chosen ones.
        level: an activation above which they are multiplied.
        strength: 0 leaves everything.
    """

    def __init__(
        self, encoder: Tensor, encoder_bias: Tensor, decoder: Tensor, k: int, chosen: Tensor, scale: Tensor,
        level: Tensor, strength: Lever,
    ) -> None:  # fmt: skip
        self.encoder, self.bias, self.decoder, self.k = encoder, encoder_bias, decoder, k
        self.chosen, self.scale, self.level, self.strength = chosen, scale, level, strength

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        x, rest = first(output)
        dense = torch.relu(x @ self.encoder.T + self.bias)
        values, places = dense.topk(self.k, dim=-1)
        latents = torch.zeros_like(dense).scatter_(-1, places, values)
        own = latents[..., self.chosen]
        edited = latents.clone()
        edited[..., self.chosen] = torch.where(own > self.level, self.scale * own, own)
        change = edited @ self.decoder - latents @ self.decoder
        return again(x + self.strength[0] * change, rest)
