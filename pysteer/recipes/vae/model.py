"""The autoencoder of the recipe: a preset or a pretrained one, with dead channels planted where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pysteer.errors import InputError
from pysteer.recipes.vae.config import ModelPart

_WIDTHS = {"tiny": (16, 32, 32), "small": (32, 64, 64), "sdxl": (128, 256, 512, 512)}
# Scale and shift of planted channels, in turn: nothing, next to nothing, a constant.
PLANTS = {"scale 0": (0.0, 0.0), "scale 1e-4": (1e-4, 0.0), "shift only": (0.0, 0.5)}


def build_model(part: ModelPart, seed: int) -> Any:
    """The autoencoder with weights from `seed`, or pretrained ones.

    Raises:
        InputError: the pretrained one cannot be loaded.
    """
    if part.pretrained_vae_name:
        model = load_model(part.pretrained_vae_name)
    else:
        from diffusers import AutoencoderKL

        widths = _WIDTHS[part.preset]
        large = part.preset == "sdxl"
        torch.manual_seed(seed)
        model = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=2 if large else 1,
            norm_num_groups=32 if large else 8,
            sample_size=1024 if large else 32,
            **({"scaling_factor": 0.13025} if large else {}),
        )
    if part.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.float()


def load_model(place: str) -> Any:
    """An AutoencoderKL from a folder (with `vae_ema/` or `vae/` inside, or of its own), or of the hub.

    Raises:
        InputError: nothing there, or nothing that can be loaded.
    """
    from diffusers import AutoencoderKL

    folder = Path(place).expanduser()
    inner = next((folder / n for n in ("vae_ema", "vae", ".") if (folder / n / "config.json").is_file()), None)
    if folder.is_dir() and inner is None:
        allowed = "a folder with vae/ inside, or of an autoencoder"
        raise InputError("no autoencoder in folder", value=place, allowed=allowed, fix="give the folder final_model")
    try:
        return AutoencoderKL.from_pretrained(str(inner or place), torch_dtype=torch.float32)
    except Exception as error:  # network, names, damaged files: the library has an error of its own for each
        raise InputError(f"autoencoder cannot be loaded ({error})", value=place, fix="check folder or name") from error


@torch.no_grad()
def plant(model: nn.Module, share: float) -> dict[str, dict[int, str]]:
    """Kill a share of the channels of every group norm; returns what was done to which channel of which module.

    The channels are spread evenly over the groups, so that no group is dead as a whole; at least one of each norm.
    """
    done: dict[str, dict[int, str]] = {}
    kinds = list(PLANTS.items())
    number = 0
    for path, module in model.named_modules():
        if share <= 0 or not isinstance(module, nn.GroupNorm) or module.weight is None:
            continue
        count = max(1, round(share * module.num_channels))
        for k in range(count):
            name, (scale, shift) = kinds[number % len(kinds)]
            number += 1
            channel = (k * module.num_channels // count + number) % module.num_channels
            module.weight[channel], module.bias[channel] = scale, shift
            done.setdefault(path, {})[channel] = name
    return done
