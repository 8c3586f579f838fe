"""The lens while training: grids of maps, projections through the trained decoder, what each channel is worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.dynamics import Lens, ablation_effect, activation_grid
from pysteer.dynamics.lens import as_maps, maps_of
from pysteer.dynamics.points import choose_points
from pysteer.recipes.vae.tables import write_csv

if TYPE_CHECKING:
    from pysteer.recipes.vae.trainer import Trainer

_FITTED_ON, _ABLATED_ON = 96, 4  # images


def lens_layers(trainer: Trainer) -> list[str]:
    """Names of the layers that are looked at, without the metrics that may stand behind them."""
    part = trainer.config.logit_lens
    asked = [*part.layers_to_analyze_direct, *part.target_tracked_metrics]
    if not asked:
        monitor = trainer.observers.monitor
        watched = [point.name for point in monitor.points] if monitor is not None else []
        # One of the encoder, one of the decoder and the last one say most.
        encoder = [name for name in watched if name.startswith("encoder")]
        decoder = [name for name in watched if name.startswith("decoder")]
        picked = [*encoder[:1], *decoder[len(decoder) // 2 : len(decoder) // 2 + 1], *decoder[-1:]]
        return list(dict.fromkeys(picked or watched[:3]))
    names = []
    for name in asked:
        for capture in (".output", ".input"):
            stem, found, _ = name.rpartition(capture)
            name = f"{stem}{capture}" if found else name
        names.append(name.removeprefix("vae."))
    return list(dict.fromkeys(names))


def as_pixels(images: Tensor) -> Tensor:
    """Images [..., 3, H, W] in [-1, 1] as uint8 [..., H, W, 3]; values beyond are cut, never wrapped around."""
    return images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).movedim(-3, -1)


def draw_lens(trainer: Trainer) -> None:
    """Write the pictures of this step into the folder of the lens."""
    part = trainer.config.logit_lens
    layers = lens_layers(trainer)
    if not layers:
        return
    source = trainer.held or trainer.images
    images = source.batch(range(min(_FITTED_ON, len(source)))).to(trainer.accelerator.device)
    monitor = trainer.observers.monitor
    shown = images[: part.num_batch_samples_to_viz]
    choose_points(trainer.plain, layers)  # an unknown name is an error before anything is drawn
    with monitor.paused() if monitor is not None else torch.no_grad():
        maps = maps_of(trainer.plain, shown, layers)
        rows, model = trainer.config.data.validation_batch_size, trainer.plain
        lens = Lens.fit(model, images, layers, batch=rows) if part.run_mini_decoder_projection else Lens()
        effects: dict[str, Tensor] = {}
        if part.ablation:
            few, most = images[:_ABLATED_ON], part.ablation_channels
            effects = ablation_effect(model, few, layers, channels=most, rows=rows)
    base = trainer.folder / part.visualization_output_subdir / f"step_{trainer.step}"
    explained: list[dict[str, Any]] = []
    for name, x in maps.items():
        grids = as_maps(x)
        if grids is None:
            continue
        folder = base / name.replace(".", "_")
        for i, own in enumerate(grids.cpu()):
            grid = activation_grid(own, colormap=part.colormap)
            files.write_image(folder / f"activation_grids/sample_{i}.png", grid)
        if name in lens.decoders:
            _draw_projections(trainer, lens, name, x, folder / "logit_lens_projections")
            explained.append({"layer": name, "explained": lens.decoders[name].explained})
    if explained:
        write_csv(base / "explained.csv", explained, ["layer", "explained"])
    if effects:
        table = [
            {"layer": name, "channel": channel, "rise_of_mse": value}
            for name, values in effects.items()
            for channel, value in enumerate(values.tolist())
            if not math.isnan(value)
        ]
        write_csv(base / "ablation.csv", table, ["layer", "channel", "rise_of_mse"])


def _draw_projections(trainer: Trainer, lens: Lens, name: str, x: Tensor, folder: Any) -> None:
    part = trainer.config.logit_lens
    if part.projection_type != "mini_decoder_full_map":
        count = min(part.num_channels_to_viz, lens.decoders[name].weight.shape[0] - 1)
        parts = lens.project_channels(name, x, range(count))
        # A contribution is small and may be negative: grey is none, the largest of the sample fills the range.
        largest = parts.abs().flatten(1).amax(1).clamp_min(1e-6)
        for i, own in enumerate(as_pixels(parts / largest[:, None, None, None, None])):
            files.write_image(
                folder / f"lens_sample_{i}_single_channel_projections_combined.png", torch.cat(list(own), 1)
            )
    if part.projection_type != "mini_decoder_single_channel":
        for i, own in enumerate(as_pixels(lens.project(name, x))):
            files.write_image(folder / f"lens_sample_{i}_full_map.png", own)
