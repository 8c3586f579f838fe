"""One LoRA adapter: low-rank factors by layer, read from the files of diffusers, PEFT and kohya, and written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.weightspace.names import parse_name


@dataclass(frozen=True)
class LowRank:
    """The change of one layer, `scale * up @ down`.

    Attributes:
        down: fp32 `[r, in]`; of a convolution `[r, in * kernel]`.
        up: fp32 `[out, r]`.
        scale: alpha / r.
        kernel: shape of the kernel of a convolution, empty for a linear layer.
        dora: whether the file also rescales the columns of the sum (DoRA); `up @ down` is then not the whole change.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    kernel: tuple[int, ...] = ()
    dora: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """The change fp32 `[out, in]` (`[out, in * kernel]` of a convolution)."""
        return self.scale * (self.up @ self.down)


@dataclass(frozen=True)
class Adapter:
    """Factors by layer (`unet.PATH` and so on), and what the file said beside them."""

    layers: Mapping[str, LowRank]
    name: str = ""
    format: str = "diffusers"
    notes: tuple[str, ...] = field(default=())

    def save(self, path: str | Path, format: str = "diffusers") -> Path:
        """Write an ordinary LoRA file.

        Args:
            path: ending in `.safetensors`.
            format: `diffusers` (for `load_lora_weights`) or `kohya` (with `.alpha`).

        Raises:
            InputError: another format, or a DoRA adapter, whose magnitudes are not kept.
        """
        if format not in ("diffusers", "kohya"):
            raise InputError("format", value=format, allowed="diffusers, kohya")
        if any(layer.dora for layer in self.layers.values()):
            raise InputError("adapter to write", value=self.name, allowed="LoRA without DoRA magnitudes")
        return files.write_safetensors(path, named_tensors(self.layers, format), {"format": "pt"})


def named_tensors(layers: Mapping[str, LowRank], format: str) -> dict[str, Tensor]:
    """Tensors by the names of a format; the scale goes into `.alpha`, which diffusers gets only where it is not 1."""
    made: dict[str, Tensor] = {}
    for layer, it in layers.items():
        spots = [1] * len(it.kernel)
        down = it.down.reshape(it.rank, -1, *it.kernel) if it.kernel else it.down
        up = it.up.reshape(*it.up.shape, *spots)
        if format == "kohya":
            component, _, rest = layer.partition(".")
            prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}.get(component)
            if prefix is None:
                raise InputError("component of a kohya file", value=component, allowed="unet, text_encoder")
            name = f"{prefix}_{rest.replace('.', '_')}"
            made[f"{name}.lora_down.weight"], made[f"{name}.lora_up.weight"] = down, up
            made[f"{name}.alpha"] = torch.tensor(it.scale * it.rank)
            continue
        made[f"{layer}.lora_A.weight"], made[f"{layer}.lora_B.weight"] = down, up
        if it.scale != 1.0:
            made[f"{layer}.alpha"] = torch.tensor(it.scale * it.rank)
    return made


def read_adapter(path: str | Path) -> Adapter:
    """Read a LoRA file of diffusers, PEFT or kohya.

    Convolutions of LoCon are flattened; with a middle factor, `mid` and `down` are multiplied out. Alpha becomes the
    scale. Biases are left out, which `notes` says, as it does of DoRA magnitudes.

    Raises:
        InputError: missing, truncated or foreign file, NaN or infinity, factors that do not fit, half a pair.
    """
    tensors, metadata = files.read_safetensors(path, "adapter")
    return adapter_of(tensors, Path(path).stem, config_alpha(Path(path)), metadata)


def config_alpha(path: Path) -> tuple[float, int] | None:
    """alpha and r of the `adapter_config.json` of PEFT beside a file; None where there is none."""
    if path.name != "adapter_model.safetensors" or not (path.parent / "adapter_config.json").is_file():
        return None
    config = path.parent / "adapter_config.json"
    found = files.read_json(config, "adapter config")
    try:
        alpha, rank = float(found["lora_alpha"]), int(found["r"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("adapter config", value=str(config), allowed="numbers lora_alpha and r") from error
    if not rank > 0:
        raise InputError("r of the adapter config", value=rank, allowed="a whole number from 1")
    return (alpha, rank) if not found.get("use_rslora") else (alpha * rank**0.5, rank)


def adapter_of(
    tensors: Mapping[str, Tensor], name: str = "", alpha: tuple[float, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Adapter:  # fmt: skip
    """The adapter of tensors by name; see `read_adapter`."""
    parts: dict[str, dict[str, Tensor]] = {}
    formats: set[str] = set()
    for full, tensor in tensors.items():
        layer, role, form = parse_name(full)
        if role in parts.setdefault(layer, {}):
            raise InputError("layer that is there twice", value=layer, allowed="each layer once")
        parts[layer][role] = tensor
        formats.add(form)
    if not parts:
        raise InputError("adapter", value="no tensors", allowed="low-rank factors by layer")
    layers = {layer: _low_rank(layer, found, alpha) for layer, found in parts.items()}
    notes = []
    if any(it.dora for it in layers.values()):
        notes.append("DoRA magnitudes left out")
    if any("bias" in found for found in parts.values()):
        notes.append("biases left out")
    return Adapter(layers, name, sorted(formats)[0], tuple(notes))


def _low_rank(layer: str, found: Mapping[str, Tensor], alpha: tuple[float, int] | None) -> LowRank:
    if "down" not in found or "up" not in found:
        raise InputError(f"factors of {layer}", value=", ".join(sorted(found)), allowed="down and up")
    down, up = found["down"].float(), found["up"].float()
    kernel: tuple[int, ...] = ()
    if down.dim() not in (2, 3, 4, 5) or up.dim() not in (2, down.dim()):
        raise InputError(f"factors of {layer}", value=f"{list(down.shape)} and {list(up.shape)}",
                         allowed="[r, in] and [out, r], or those of a convolution")  # fmt: skip
    if "mid" in found:
        mid = found["mid"].float()
        if mid.dim() != down.dim() or mid.shape[1] != down.shape[0] or down[0, 0].numel() != 1:
            raise InputError(f"middle factor of {layer}", value=list(mid.shape), allowed=f"[r, {len(down)}, kernel]")
        down = torch.einsum("rs...,si->ri...", mid, down.flatten(1))
    if down.dim() > 2:
        kernel, down = tuple(down.shape[2:]), down.flatten(1)
        if up.dim() > 2 and up[0, 0].numel() != 1:
            raise InputError(f"up factor of {layer}", value=list(up.shape), allowed="[out, r, 1, 1]")
        up = up.flatten(1)
    if up.shape[1] != down.shape[0] or 0 in (*up.shape, *down.shape):
        raise InputError(f"ranks of {layer}", value=f"{list(down.shape)} and {list(up.shape)}", allowed="one rank")
    scale = 1.0
    if "alpha" in found:
        if found["alpha"].numel() != 1:
            raise InputError(f"alpha of {layer}", value=list(found["alpha"].shape), allowed="one number")
        scale = float(found["alpha"]) / down.shape[0]
    elif alpha is not None:
        scale = alpha[0] / alpha[1]
    return LowRank(down, up, scale, kernel, "magnitude" in found)
