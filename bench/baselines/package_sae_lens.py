"""The real package sae-lens on the case of `bench.works.autoencoder`: run by the Python of its own environment."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from bench.serving import Prepared, serve
from bench.works.autoencoder import KEPT, load_case


def main() -> None:
    """Serve the works on an autoencoder."""
    folder = Path(sys.argv[1])

    def prepare(name: str) -> Prepared:
        case = load_case(folder, name)
        latents, width = case["encoder"].shape
        settings = TopKSAEConfig(
            d_in=width, d_sae=latents, k=KEPT, dtype="float32", device="cpu", apply_b_dec_to_input=False
        )
        sae = TopKSAE(settings)
        sae.W_enc.data.copy_(case["encoder"].T)
        sae.b_enc.data.copy_(case["bias"])
        sae.W_dec.data.copy_(case["decoder"])
        sae.b_dec.data.zero_()
        x = case["x"]
        facts = {"version": version("sae-lens")}
        return Prepared(lambda: sae.decode(sae.encode(x)), lambda: sae.decode(sae.encode(x)), len(x), facts=facts)

    serve(prepare)


if __name__ == "__main__":
    main()
