"""The real package repeng on the case of `bench.works.language`: run by the Python of its own environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from repeng.control import ControlModel, ControlModule
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.serving import serve
from bench.works.decoding import prepare_peer

# Newer transformers ask a layer for its kind of attention; the package's wrapper does not pass the question on.
_PASSED_ON = ("attention_type", "layer_type")


def main() -> None:
    """Serve the works on a mean shift at every block."""
    folder = Path(sys.argv[1])
    case = load_file(folder / "case.safetensors")
    vectors = {int(name.split(".")[1]): bias for name, bias in case.items() if name.startswith("blocks.")}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", torch_dtype=torch.float32).eval()
    control: Any = ControlModel(model, list(vectors))
    for layer in model.model.layers:
        for name in _PASSED_ON:
            if isinstance(layer, ControlModule) and hasattr(layer.block, name):
                setattr(layer, name, getattr(layer.block, name))

    def set_strength(value: float) -> None:
        control.set_raw_control({layer: value * vector for layer, vector in vectors.items()})

    serve(lambda name: prepare_peer(control, name, set_strength, "repeng"))


if __name__ == "__main__":
    main()
