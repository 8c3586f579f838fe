"""Statistics of rows of numbers: of flat vectors, of tensors, of spectra."""

from __future__ import annotations

import torch
from torch import Tensor

STATS5 = ("mean", "std", "median", "min", "max")
STATS7 = (*STATS5, "skew", "kurtosis")
QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def statistics(x: Tensor, count: int = 5) -> Tensor:
    """Statistics `[N, 5]` or `[N, 7]` fp32 of rows `[N, M]`: mean, std (population), median, min, max, skew, kurtosis.

    The median of an even number of values is the middle of the two in the middle. Skew and kurtosis are the third and
    fourth standardised moments, 0 and 0 (excess kurtosis, Fisher) for a normal distribution; 0 for constant rows.
    """
    ordered = x.sort(1).values
    middle = x.shape[1] // 2
    median = ordered[:, middle] if x.shape[1] % 2 else (ordered[:, middle - 1] + ordered[:, middle]) / 2
    mean = x.mean(1, dtype=torch.float64)
    centred = x.double() - mean[:, None]
    std = centred.square().mean(1).sqrt()
    found = [mean, std, median, ordered[:, 0], ordered[:, -1]]
    if count == 7:
        unit = centred / std.clamp_min(1e-30)[:, None]
        flat = std <= 1e-30
        found += [unit.pow(3).mean(1).masked_fill(flat, 0), (unit.pow(4).mean(1) - 3).masked_fill(flat, 0)]
    return torch.stack([each.double() for each in found], 1).float()


def quantiles(x: Tensor, places: tuple[float, ...] = QUANTILES) -> Tensor:
    """Quantiles fp32 `[N, len(places)]` of rows `[N, M]`, interpolated linearly."""
    ordered = x.sort(1).values
    at = torch.tensor(places, dtype=torch.float64) * (x.shape[1] - 1)
    low = at.floor().long()
    share = (at - low).float()
    high = (low + 1).clamp_max(x.shape[1] - 1)
    return ordered[:, low] * (1 - share) + ordered[:, high] * share


def fourier(x: Tensor, bands: int = 8) -> Tensor:
    """Shape of the spectrum of rows `[N, M]` read as signals: shares of power in `bands` bands, centroid, entropy,
    flatness and the share of the highest peak; fp32 `[N, bands + 4]`. The mean (frequency 0) is left out.
    """
    power = torch.fft.rfft(x.float() - x.mean(1, keepdim=True)).abs().square()[:, 1:]
    if power.shape[1] == 0:
        return x.new_zeros(len(x), bands + 4)
    share = power / power.sum(1, keepdim=True).clamp_min(1e-30)
    at = torch.linspace(0, 1, share.shape[1])
    edges = (torch.arange(share.shape[1]) * bands // share.shape[1]).expand(len(x), -1)
    in_bands = x.new_zeros(len(x), bands).scatter_add_(1, edges, share)
    entropy = torch.special.entr(share).sum(1) / max(1e-9, torch.tensor(float(share.shape[1])).log().item())
    flatness = (power.clamp_min(1e-30).log().mean(1) - power.mean(1).clamp_min(1e-30).log()).exp()
    more = [(share * at).sum(1), entropy, flatness, share.max(1).values]
    return torch.cat([in_bands, torch.stack(more, 1)], 1)


def norms(x: Tensor) -> Tensor:
    """Norms fp32 `[N, 7]` of rows: 1, 2, maximum, mean absolute, root mean square, 1/2, Hoyer sparsity."""
    size, a = x.shape[1], x.abs()
    one, two, most = a.sum(1), a.square().sum(1).sqrt(), a.max(1).values
    hoyer = (size**0.5 - one / two.clamp_min(1e-30)) / max(1e-9, size**0.5 - 1)
    return torch.stack([one, two, most, one / size, two / size**0.5, a.sqrt().mean(1), hoyer], 1)


def entropies(x: Tensor, bins: int = 32) -> Tensor:
    """Entropy fp32 `[N, 2]` of rows: of a histogram of `bins` equal bins from min to max, and of the shares of |x|."""
    low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
    place = ((x - low) / (high - low).clamp_min(1e-30) * bins).long().clamp_(0, bins - 1)
    counts = x.new_zeros(len(x), bins).scatter_add_(1, place, torch.ones_like(x)) / x.shape[1]
    share = x.abs() / x.abs().sum(1, keepdim=True).clamp_min(1e-30)
    return torch.stack([torch.special.entr(counts).sum(1), torch.special.entr(share).sum(1)], 1)
