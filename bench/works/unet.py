"""Work with the bundled diffusion pipeline: a mean shift at every site of the UNet, or unlearning with an autoencoder.

Kinds of contenders are `HOW MODE`, such as `pysteer compiled`; works are `unet, all sites, batch N` and `unet,
autoencoder, batch N`. A run is a few denoising steps with guidance; images are not decoded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baselines import hooks
from bench.serving import Prepared

STEPS = 3
CHOSEN = [5, 17, 400]
SITES = re.compile(r"(resnet|attn|ca|ff|block)\.\d+")
SAE_SITE, LATENTS, KEPT = "ca.3", 16, 32  # the middle of the UNet; latents per unit of width; latents kept per token


def places(generator: Any, work_name: str) -> dict[str, Any]:
    """The sites that are steered: all with a short name, or the one with the autoencoder."""
    from pysteer.families.base import find_family

    sites = find_family(generator).sites(generator)
    wanted = [SAE_SITE] if "autoencoder" in work_name else [name for name in sites if SITES.fullmatch(name)]
    return {name: sites[name] for name in wanted}


def bias_of(name: str, width: int) -> Tensor:
    """The shift of a site."""
    return 0.05 * torch.randn(width, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def autoencoder(width: int) -> dict[str, Tensor]:
    """A random autoencoder with three latents that are multiplied by -1 where they exceed a level."""
    generator = torch.Generator().manual_seed(3)
    encoder = torch.randn(LATENTS * width, width, generator=generator) / width**0.5
    bias = 0.01 * torch.randn(len(encoder), generator=generator)
    bias[CHOSEN] += 1.0  # so that they are among the k largest of many tokens
    return {
        "encoder": encoder,
        "bias": bias,
        "decoder": torch.randn(len(encoder), width, generator=generator) / width**0.5,
        "chosen": torch.tensor(CHOSEN),
        "scale": torch.full((3,), -1.0),
        "level": torch.zeros(3),
    }


def _plan(sites: dict[str, Any], sae: bool) -> Any:
    from pysteer.steering import Plan, SiteParameters

    if not sae:
        entries = []
        for name, site in sites.items():
            bias = bias_of(name, site.width)[None]
            entries.append(SiteParameters(name, "affine_shift", None, {"gain": torch.ones_like(bias), "bias": bias}))
        return Plan.build(entries, rows="both")
    (name, site), *_ = sites.items()
    a = autoencoder(site.width)
    picked = a["chosen"]
    banks = {
        "encoder": a["encoder"][picked][None], "encoder_bias": a["bias"][picked][None],
        "decoder": a["decoder"][picked][None], "scale": a["scale"][None], "add": torch.zeros(1, 3),
        "level": a["level"][None], "latent": picked.to(torch.int32)[None],
    }  # fmt: skip
    shared = {"full_encoder": a["encoder"], "full_bias": a["bias"]}
    entry = SiteParameters(name, "sae_edit", None, banks, {"gate": "topk", "k": KEPT}, shared)
    return Plan.build([entry], rows="both")


def _steer(unet: Any, sites: dict[str, Any], sae: bool) -> None:
    """Steer as others do: a hook per site, or SAeUron's."""
    lever: hooks.Lever = [1.0]
    for name, site in sites.items():
        module = unet.get_submodule(site.path)
        if sae:
            a = autoencoder(site.width)
            edit = hooks.SaeuronEdit(
                a["encoder"], a["bias"], a["decoder"], KEPT, a["chosen"], a["scale"], a["level"], lever
            )
            module.register_forward_hook(edit)
        elif site.layout == "channels":
            module.register_forward_hook(hooks.channels(bias_of(name, site.width), lever))
        else:
            module.register_forward_hook(hooks.add(bias_of(name, site.width), lever))


def prepare(kind: str, folder: Path, work_name: str) -> Prepared:
    """A contender of this part with a work."""
    import pysteer
    from pysteer.zoo.shapes.captions import captions_of, sample_scenes

    batch, sae = int(work_name.rpartition("-")[2]), "autoencoder" in work_name
    how, _, mode = kind.partition(" ")
    generator = pysteer.zoo.load("diffusion-shapes")
    generator.pipe.set_progress_bar_config(disable=True)
    sites = places(generator, work_name)
    if how == "pysteer":
        pysteer.steer(generator, _plan(sites, sae)).__enter__()
    elif how != "unsteered":
        _steer(generator.pipe.unet, sites, sae)
    if mode == "compiled":
        generator.pipe.unet.compile(fullgraph=True, dynamic=False)
    prompts = captions_of(sample_scenes(batch, seed=1))

    def generate() -> Tensor:
        latents: Tensor = generator(prompts, seeds=0, num_inference_steps=STEPS, decode=False).latents
        return latents

    return Prepared(generate, generate, batch, facts={"sites": len(sites)})
