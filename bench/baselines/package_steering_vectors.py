"""The real package steering-vectors on the case of `bench.works.language`: run by the Python of its own environment."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM

from bench.serving import Prepared, serve
from bench.works.decoding import Decoder, find, levels, one_by_one


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

    def prepare(name: str) -> Prepared:
        work = find(name)
        set_strength(1.0)
        decoder = Decoder(model, work)
        facts = {"version": version("steering-vectors")}
        swept = levels(work.strengths)
        if swept:
            sweep = lambda: one_by_one(decoder, set_strength, swept)  # noqa: E731
            return Prepared(sweep, sweep, len(swept) * work.new, facts=facts)
        units = work.batch * (work.new or work.prompt)
        return Prepared(decoder.run, decoder.run, units, setup=decoder.setup, facts=facts)

    serve(prepare)


if __name__ == "__main__":
    main()
