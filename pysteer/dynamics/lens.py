"""Looking at channels as pictures: a trained decoder per layer, the loss a channel is worth, and grids of maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysteer.dynamics.points import Layers, Point, choose_points, first_tensor
from pysteer.errors import InputError
from pysteer.steering.site import brief

Reconstruct = Callable[[Tensor], Tensor]
_MOST_PLACES = 1 << 17  # of one batch


def reconstruction(model: Any) -> Reconstruct:
    """`images -> decode(mode of the posterior)` of an autoencoder of diffusers; the model itself for all others."""
    if not hasattr(model, "encode") or not hasattr(model, "decode"):
        return lambda images: first_tensor(model(images))  # type: ignore[return-value]
    return lambda images: model.decode(model.encode(images).latent_dist.mode()).sample


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _seen(model: nn.Module, points: Sequence[Point]) -> Iterator[dict[str, Tensor]]:
    """Activations of the last forward pass by point."""
    modules, found, hooks = dict(model.named_modules()), {}, []

    def keep(name: str, x: Any) -> None:
        tensor = first_tensor(x)
        if tensor is not None:
            found[name] = tensor.detach()

    for point in points:
        module, name = modules[point.path], point.name
        if point.capture == "output":
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: keep(name, output)))
        else:
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def as_maps(x: Tensor) -> Tensor | None:
    """Activations as maps [N, C, h, w]: [N, C, L] of a square becomes one; None for all else."""
    if x.dim() == 4:
        return x
    side = math.isqrt(x.shape[-1]) if x.dim() == 3 else 0
    return x.unflatten(-1, (side, side)) if side and side * side == x.shape[-1] else None


def maps_of(model: nn.Module, images: Tensor, layers: Layers, *, run: Reconstruct | None = None) -> dict[str, Tensor]:
    """Activations of images at layers, by point, as the model is evaluated."""
    with _evaluating(model), _seen(model, choose_points(model, layers)) as seen:
        (run or reconstruction(model))(images)
    return seen


@dataclass
class _Decoder:
    """A linear map from the channels at a place to the pixels of its patch, [C + 1, 3 p p], and what it explains."""

    weight: Tensor
    mean: Tensor
    patch: int
    explained: float


@dataclass
class Lens:
    """A small decoder per layer, from its activations to pixels: y = sum_c W_c (x_c - mean_c) + b at every place.

    The decoder is a transposed convolution with kernel and stride p, the ratio of the sides of picture and map. It is
    the ridge regression of the pixels of each patch on the channels at its place, solved exactly from sums in fp64:
    there are no steps to tune, and it can be fitted again whenever the model has changed.
    A channel whose picture is blank tells a linear reader nothing that the others do not.

    Attributes:
        decoders: by point.
        shape: of the images it was fitted on, (channels, height, width).
    """

    decoders: dict[str, _Decoder] = field(default_factory=dict)
    shape: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        images: Tensor,
        layers: Layers = "norm",
        *,
        run: Reconstruct | None = None,
        batch: int = 64,
        ridge: float = 1e-4,
    ) -> Lens:
        """Fit the decoders of layers on images.

        Args:
            model: the model.
            images: [N, 3, H, W] as the model takes them; a quarter is held out to measure what is explained.
            layers: which, see `choose_points`; those without maps, and maps larger than the image, are left out.
            run: how the model is run on images; None reconstructs.
            batch: images at once.
            ridge: weight of |W|^2, relative to the mean variance of the channels.
        """
        if len(images) < 4:
            raise InputError("images of a lens", value=len(images), allowed="at least 4")
        run, points = run or reconstruction(model), choose_points(model, layers)
        fitted, held = images[: -(len(images) // 4)], images[-(len(images) // 4) :]
        lens = cls(shape=tuple(images.shape[1:]))  # type: ignore[arg-type]
        sums: dict[str, tuple[Tensor, int]] = {}
        with _evaluating(model), _seen(model, points) as seen:
            for part in fitted.split(batch):
                run(part)
                for name, x in seen.items():
                    joint = _joint(x, part)
                    if joint is not None:
                        gram, patch = joint[0].T @ joint[0], joint[1]
                        sums[name] = (sums[name][0] + gram if name in sums else gram, patch)
        for name, (gram, patch) in sums.items():
            lens.decoders[name] = _solve(gram, images.shape[1] * patch * patch, patch, ridge)
        lens._measure(model, held, points, run, batch)
        return lens

    def _measure(self, model: nn.Module, images: Tensor, points: Sequence[Point], run: Reconstruct, batch: int) -> None:
        missed: dict[str, float] = dict.fromkeys(self.decoders, 0.0)
        with _evaluating(model), _seen(model, points) as seen:
            for part in images.split(batch):
                run(part)
                for name in self.decoders:
                    missed[name] += float((self.project(name, seen[name]) - part).double().square().sum())
        spread = float((images.double() - images.double().mean((0, 2, 3), keepdim=True)).square().sum())
        for name, decoder in self.decoders.items():
            decoder.explained = 1 - missed[name] / spread if spread else 0.0

    def _decoder(self, name: str) -> _Decoder:
        if name not in self.decoders:
            raise InputError("layer of the lens", value=name, allowed=brief(self.decoders), fix="fit it on this layer")
        return self.decoders[name]

    def project(self, name: str, x: Tensor) -> Tensor:
        """The picture that the whole map [N, C, h, w] of a point stands for, [N, 3, H, W]."""
        decoder = self._decoder(name)
        maps = as_maps(x)
        assert maps is not None
        weight = decoder.weight.to(maps.device, torch.float32)
        values = torch.einsum("nchw,cq->nqhw", maps.float() - decoder.mean.to(weight)[:, None, None], weight[:-1])
        return F.pixel_shuffle(values + weight[-1][:, None, None], decoder.patch)

    def project_channels(self, name: str, x: Tensor, channels: Sequence[int]) -> Tensor:
        """What each channel adds to the picture of the map, [N, k, 3, H, W]; all channels and the mean sum to it."""
        decoder = self._decoder(name)
        maps = as_maps(x)
        assert maps is not None
        if not all(0 <= c < maps.shape[1] for c in channels):
            raise InputError(f"channels of {name}", value=list(channels), allowed=f"0 to {maps.shape[1] - 1}")
        chosen = torch.as_tensor(list(channels))
        weight, mean = decoder.weight.to(maps.device, torch.float32)[chosen], decoder.mean.to(maps)[chosen]
        away = maps[:, chosen].float() - mean[:, None, None]
        return F.pixel_shuffle(torch.einsum("nkhw,kq->nkqhw", away, weight), decoder.patch)


def _joint(x: Tensor, images: Tensor) -> tuple[Tensor, int] | None:
    """Rows [places, C + 1 + 3 p p] of channels, a one and pixels in fp64, and p; None where there is no such map.

    Of more than `_MOST_PLACES` places of large maps, evenly spread ones are taken.
    """
    maps = as_maps(x)
    if maps is None or len(maps) != len(images):
        return None
    patch = images.shape[-1] // maps.shape[-1] if maps.shape[-1] else 0
    if patch < 1 or maps.shape[-2] * patch != images.shape[-2] or maps.shape[-1] * patch != images.shape[-1]:
        return None
    parts = [each.movedim(1, -1).flatten(0, -2) for each in (maps, F.pixel_unshuffle(images, patch))]
    every = -(-len(parts[0]) // _MOST_PLACES)
    channels, pixels = (part[::every].double() for part in parts)
    return torch.cat([channels, torch.ones_like(channels[:, :1]), pixels], 1), patch


def _solve(gram: Tensor, outputs: int, patch: int, ridge: float) -> _Decoder:
    """Ridge regression around the means from the sums of products of (channels, one, pixels)."""
    inputs = gram.shape[0] - outputs - 1
    count = gram[inputs, inputs]
    means = gram[inputs] / count
    centred = gram / count - torch.outer(means, means)
    covariance = centred[:inputs, :inputs]
    strength = ridge * covariance.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(inputs, dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(covariance + strength * eye, centred[:inputs, inputs + 1 :])
    return _Decoder(torch.cat([weight, means[None, inputs + 1 :]]).cpu(), means[:inputs].cpu(), patch, math.nan)


def ablation_effect(
    model: nn.Module,
    images: Tensor,
    layers: Layers = "norm",
    *,
    channels: int | None = None,
    run: Reconstruct | None = None,
    replace: str = "zero",
    rows: int = 256,
) -> dict[str, Tensor]:
    """How much the mean squared reconstruction error rises when a channel is silenced, by point, [C] fp64.

    Many channels are silenced at once, each in its own copy of the images. For layers of the decoder of an autoencoder
    the images are encoded once.

    Args:
        model: the model.
        images: [N, 3, H, W] as the model takes them; a few are enough.
        layers: outputs of which layers, see `choose_points`.
        channels: the most channels of a layer, spread evenly; the others are NaN. None takes all.
        run: how the model is run on images; None reconstructs.
        replace: "zero", or "mean": the mean of the channel over the images.
        rows: rows of a batch.
    """
    if replace not in ("zero", "mean"):
        raise InputError("replace", value=replace, allowed="zero, mean")
    points = [point for point in choose_points(model, layers) if point.capture == "output"]
    modules = dict(model.named_modules())
    effects: dict[str, Tensor] = {}
    whole = run or reconstruction(model)
    with _evaluating(model):
        with _seen(model, points) as seen:
            base = (whole(images) - images).double().square().mean()
            held = {point.name: seen[point.name] for point in points if point.name in seen}
        for point in points:
            if point.name not in held:
                continue
            start, rest = images, whole
            if run is None and hasattr(model, "decode") and point.path.startswith("decoder."):
                start, rest = _latents(model, images), _decoded(model)
            silence = _Silence(modules[point.path], point, held[point.name], replace)
            errors = silence.errors(rest, start, images, channels, rows)
            effects[point.name] = errors - base.cpu()
    return effects


def _latents(model: Any, images: Tensor) -> Tensor:
    return model.encode(images).latent_dist.mode()


def _decoded(model: Any) -> Reconstruct:
    return lambda latents: model.decode(latents).sample


class _Silence:
    """Silences channels of one layer, each in its own share of the rows."""

    def __init__(self, module: nn.Module, point: Point, x: Tensor, replace: str) -> None:
        dim = point.channel_dim if point.channel_dim is not None else 1 if x.dim() >= 4 else -1
        self.module, self.dim, self.width = module, dim % x.dim(), x.shape[dim]
        others = [d for d in range(x.dim()) if d != self.dim]
        self.value = x.double().mean(others) if replace == "mean" else torch.zeros(self.width, device=x.device)
        self.channels = torch.empty(0, dtype=torch.int64)

    def errors(self, rest: Reconstruct, start: Tensor, images: Tensor, most: int | None, rows: int) -> Tensor:
        """The mean squared error with each channel silenced, [C]; NaN for those that are left out."""
        count = min(self.width, most or self.width)
        chosen = torch.arange(count, device=start.device) * self.width // count
        errors = torch.full((self.width,), math.nan, dtype=torch.float64)
        hook = self.module.register_forward_hook(self._change)
        try:
            for self.channels in chosen.split(max(1, rows // len(images))):
                copies = start.repeat(len(self.channels), *[1] * (start.dim() - 1))
                missed = rest(copies).unflatten(0, (len(self.channels), -1)) - images
                errors[self.channels.cpu()] = missed.double().square().flatten(1).mean(1).cpu()
        finally:
            hook.remove()
        return errors

    def _change(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        y = first_tensor(output)
        assert y is not None
        y = y.clone().unflatten(0, (len(self.channels), -1)).movedim(self.dim + 1, 2)
        each = torch.arange(len(self.channels), device=y.device)
        new = self.value[self.channels].to(y.dtype).view(-1, *[1] * (y.dim() - 2))
        y[each, :, self.channels] = new.expand_as(y[each, :, self.channels])
        return y.movedim(2, self.dim + 1).flatten(0, 1)


def activation_grid(maps: Tensor, *, columns: int = 8, tile: int = 48, colormap: str = "viridis") -> Tensor:
    """Maps [C, h, w] as one picture uint8 [H, W, 3], each scaled to its own range; flat ones are dark."""
    import matplotlib

    if maps.dim() != 3 or not len(maps):
        raise InputError("maps of a grid", value=list(maps.shape), allowed="[C, h, w] with C >= 1")
    if colormap not in matplotlib.colormaps:
        raise InputError("colormap", value=colormap, allowed="one of matplotlib", fix="viridis")
    low, high = maps.float().amin((1, 2), keepdim=True), maps.float().amax((1, 2), keepdim=True)
    scaled = (maps.float() - low) / (high - low).clamp_min(1e-12)
    sized = F.interpolate(scaled[None], size=(tile, tile), mode="nearest")[0].cpu().numpy()
    coloured = (matplotlib.colormaps[colormap](sized)[..., :3] * 255).round().astype(np.uint8)
    columns = min(columns, len(coloured))
    lines = -(-len(coloured) // columns)
    sheet = np.full((lines * (tile + 2) - 2, columns * (tile + 2) - 2, 3), 255, np.uint8)
    for index, picture in enumerate(coloured):
        y, x = index // columns * (tile + 2), index % columns * (tile + 2)
        sheet[y : y + tile, x : x + tile] = picture
    return torch.from_numpy(sheet)
