"""The real package eai-sparsify on the case of `bench.works.autoencoder`: run by the Python of its own environment."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsify import SparseCoder, SparseCoderConfig

from bench.serving import Prepared, serve
from bench.works.autoencoder import KEPT, load_case


def main() -> None:
    """Serve the works on an autoencoder."""
    folder = Path(sys.argv[1])

    def prepare(name: str) -> Prepared:
        case = load_case(folder, name)
        latents, width = case["encoder"].shape
        coder = SparseCoder(width, SparseCoderConfig(num_latents=latents, k=KEPT, normalize_decoder=False))
        coder.encoder.weight.data.copy_(case["encoder"])
        coder.encoder.bias.data.copy_(case["bias"])
        coder.W_dec.data.copy_(case["decoder"])
        coder.b_dec.data.zero_()
        x = case["x"]

        def run() -> Any:
            found = coder.encode(x)
            return coder.decode(found.top_acts, found.top_indices)

        return Prepared(run, run, len(x), facts={"version": version("eai-sparsify")})

    serve(prepare)


if __name__ == "__main__":
    main()
