"""Measures of what steering did: classifier rates, feature distances, pixel change."""

from pysteer.metrics.feature_distance import frechet_distance, kernel_distance
from pysteer.metrics.images import change_outside, object_masks
from pysteer.metrics.rates import Rate, rate, relative_rate, wilson

__all__ = [
    "Rate",
    "change_outside",
    "frechet_distance",
    "kernel_distance",
    "object_masks",
    "rate",
    "relative_rate",
    "wilson",
]
