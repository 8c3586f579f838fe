"""Small adapters and files of them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = {"unet.mid_block.attentions.0.to_q": (6, 5), "unet.up_blocks.1.attentions.0.to_v": (4, 5)}


def tensors(seed: int, rank: int = 2, layers=LAYERS) -> dict:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (inputs, out) in layers.items():
        made[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        made[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return made


def write(path: Path, seed: int, rank: int = 2, label: str = "", images=(), layers=LAYERS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors(seed, rank, layers), path)
    if label or images:
        path.with_suffix(".json").write_text(json.dumps({"label": label, "image_ids": list(images)}))
    return path
