"""How far an op may be from its result in fp64, and why. Looked up by op and variant first, then by dtype alone."""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """|result - truth| <= absolute + relative |truth|."""

    relative: float
    absolute: float
    reason: str


TOLERANCES: dict[tuple[str, ...], Tolerance] = {
    ("float32",): Tolerance(
        1e-5, 1e-5, "fp32 arithmetic on values of order one; the absolute part covers y = x + s u with y near zero"
    ),
    ("bfloat16",): Tolerance(
        2**-8 * 1.01, 1e-5, "half a unit in the last of 8 bits: one rounding of the fp32 result, and fp32 as above"
    ),
    ("float16",): Tolerance(
        2**-11 * 1.05, 1e-5, "half a unit in the last of 11 bits: one rounding of the fp32 result, and fp32 as above"
    ),
    ("float64",): Tolerance(1e-12, 1e-12, "plain torch in fp64 throughout"),
    ("prototype_shift", "soft", "float32"): Tolerance(
        1e-3, 5e-3, "scores reach 2000 at D = 4608, so fp32 leaves them uncertain by 1e-3, and exp() hands that on"
    ),
    ("prototype_shift", "soft-pull", "float32"): Tolerance(1e-3, 5e-3, "as soft"),
    ("prototype_shift", "soft", "bfloat16"): Tolerance(2**-8 * 1.3, 5e-3, "as soft, and one rounding"),
    ("prototype_shift", "soft-pull", "bfloat16"): Tolerance(2**-8 * 1.3, 5e-3, "as soft, and one rounding"),
    ("prototype_shift", "soft", "float16"): Tolerance(2**-11 + 1e-3, 5e-3, "as soft, and one rounding"),
    ("prototype_shift", "soft-pull", "float16"): Tolerance(2**-11 + 1e-3, 5e-3, "as soft, and one rounding"),
    ("gradient_shift", "soft", "float32"): Tolerance(1e-3, 5e-3, "softmax of large scores, as in prototype_shift"),
    ("gradient_shift", "soft", "bfloat16"): Tolerance(2**-8 * 1.3, 5e-3, "as in fp32, and one rounding"),
    ("gradient_shift", "soft", "float16"): Tolerance(2**-11 + 1e-3, 5e-3, "as in fp32, and one rounding"),
    ("channel_moments", "plain", "float32"): Tolerance(
        2e-5, 2e-5, "blocks of thousands of values summed in fp32; means of order one may cancel to near zero"
    ),
    ("channel_moments", "plain", "bfloat16"): Tolerance(2e-5, 2e-5, "as in fp32: the result is not rounded to bf16"),
    ("channel_moments", "plain", "float16"): Tolerance(2e-5, 2e-5, "as in fp32: the result is not rounded to fp16"),
    ("lowrank_features", "plain", "float32"): Tolerance(
        1e-5, 1e-5, "elements are fp32 sums of r products, all else is fp64"
    ),
    ("lowrank_features", "plain", "bfloat16"): Tolerance(
        1e-5, 1e-5, "as in fp32: factors are exact, results are not rounded"
    ),
    ("lowrank_features", "plain", "float16"): Tolerance(1e-5, 1e-5, "as in bf16"),
    ("lowrank_features", "median", "float32"): Tolerance(
        1e-5, 1e-5, "elements are fp32 sums of r products, all else is fp64"
    ),
    ("lowrank_features", "median", "bfloat16"): Tolerance(
        1e-5, 1e-5, "as in fp32: factors are exact, results are not rounded"
    ),
    ("lowrank_features", "median", "float16"): Tolerance(1e-5, 1e-5, "as in bf16"),
    ("lowrank_features", "closed", "float32"): Tolerance(
        1e-5, 1e-5, "elements are fp32 sums of r products, all else is fp64"
    ),
    ("lowrank_features", "closed", "bfloat16"): Tolerance(
        1e-5, 1e-5, "as in fp32: factors are exact, results are not rounded"
    ),
    ("lowrank_features", "closed", "float16"): Tolerance(1e-5, 1e-5, "as in bf16"),
    ("linear_shift", "plain", "float32"): Tolerance(2e-5, 5e-5, "the product adds up to 4608 terms, in fp32"),
    ("linear_shift", "plain", "bfloat16"): Tolerance(2**-8 * 1.01, 5e-5, "one rounding of the fp32 result"),
    ("linear_shift", "plain", "float16"): Tolerance(2**-11 * 1.05, 5e-5, "one rounding of the fp32 result"),
    ("gram_accumulate", "plain", "float32"): Tolerance(
        1e-5, 1e-6, "relative to the lengths of both channels: sums of thousands of products of either sign cancel"
    ),
    ("gram_accumulate", "plain", "bfloat16"): Tolerance(1e-5, 1e-6, "as in fp32: the result is not rounded"),
    ("gram_accumulate", "plain", "float16"): Tolerance(1e-5, 1e-6, "as in bf16"),
}


def tolerance(op: str, variant: str, dtype: torch.dtype) -> Tolerance:
    """Return the row that holds for an op, its variant and a dtype."""
    name = str(dtype).removeprefix("torch.")
    return TOLERANCES.get((op, variant, name)) or TOLERANCES[(name,)]
