"""The real package steering-vectors on the case of `bench.works.language`: run by the Python of its own environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM

from bench.serving import serve
from bench.works.decoding import prepare_peer


def main() -> None:
    """Serve the works on a mean shift at every block."""
    folder = Path(sys.argv[1])
    case = load_file(folder / "case.safetensors")
    vectors = {int(name.split(".")[1]): bias for name, bias in case.items() if name.startswith("blocks.")}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", torch_dtype=torch.float32).eval()
    vector = SteeringVector(vectors, "decoder_block")
    handles: list[Any] = []

    def set_strength(value: float) -> None:
        while handles:
            handles.pop().remove()
        handles.append(vector.patch_activations(model, multiplier=value))

    serve(lambda name: prepare_peer(model, name, set_strength, "steering-vectors"))


if __name__ == "__main__":
    main()
