"""Maps at a site for the tests of folding, and the plain way to apply one: a hook that computes it from its formula."""

import torch
from torch import Tensor, nn

from pysteer.steering import SiteParameters


def parameters(kind: str, site: str, width: int, seed: int = 0) -> SiteParameters:
    """An "affine" map, a "constant" shift, a "gain", or a map of "low_rank" 2, that moves activations noticeably."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "low_rank":
        banks = {
            "read": torch.randn(1, 2, width, generator=generator) / width**0.5,
            "write": torch.randn(1, 2, width, generator=generator),
            "bias": 0.3 * torch.randn(1, width, generator=generator),
        }
        return SiteParameters(site, "low_rank_shift", None, banks)
    gain = 1 + 0.4 * torch.randn(1, width, generator=generator) * (kind != "constant")
    bias = 0.5 * torch.randn(1, width, generator=generator) * (kind != "gain")
    return SiteParameters(site, "affine_shift", None, {"gain": gain, "bias": bias})


def moved(x: Tensor, entry: SiteParameters, s: float, channels: bool = False) -> Tensor:
    """`x + s ((g - 1) x + b)`, or `x + s (write' (read x) + b)`, along the last dimension or the channels."""
    banks = {name: bank[0].to(x.dtype) for name, bank in entry.tensors.items()}
    last = x.movedim(1, -1) if channels else x
    if entry.op == "low_rank_shift":
        y = last + s * ((last @ banks["read"].T) @ banks["write"] + banks["bias"])
    else:
        y = last + s * ((banks["gain"] - 1) * last + banks["bias"])
    return y.movedim(-1, 1) if channels else y


class Hooked:
    """Steers with a forward hook while it is open; `calls` counts how often the module ran."""

    def __init__(self, module: nn.Module, entry: SiteParameters, site, s: float = 1.0) -> None:
        self.entry, self.site, self.s, self.calls = entry, site, s, 0
        self.hook = module.register_forward_hook(self)

    def __enter__(self) -> "Hooked":
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()

    def __call__(self, module, args, output):
        self.calls += 1
        if isinstance(output, Tensor):
            return moved(output, self.entry, self.s, self.site.layout == "channels")
        if isinstance(output, dict):
            key = next(iter(output))
            return type(output)(
                **{**output, key: moved(output[key], self.entry, self.s, self.site.layout == "channels")}
            )
        items = list(output)
        which = self.site.element or 0
        items[which] = moved(items[which], self.entry, self.s, self.site.layout == "channels")
        return tuple(items)
