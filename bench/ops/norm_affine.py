"""What is measured of `norm_affine`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.registry import BF16, BOTH, FP32, GPU, Row, copied, copy_of_x, elements
from pysteer.ops import Case
from pysteer.ops.affine_shift import affine_shift

ROWS = [
    Row("norm_affine", Case(4, 1024, 2048, BF16, strength="one"), BOTH, "rms"),
    Row("norm_affine", Case(4, 1024, 2048, FP32, strength="one"), BOTH, "layer"),
    Row("norm_affine", Case(16, 64, 192, FP32, strength="one"), variant="layer"),
    Row("norm_affine", Case(4, 4096, 320, BF16, "channels_first", "one"), BOTH, "group"),
    Row("norm_affine", Case(4, 4096, 320, BF16, "channels_last", "one"), BOTH, "group"),
    Row("norm_affine", Case(64, 1, 2304, BF16, strength="one"), BOTH, "gemma"),
    Row("norm_affine", Case(32, 4096, 2048, BF16, strength="one"), GPU, "rms"),
]
floor = copy_of_x


def cost(case: Case) -> tuple[int, int]:
    """One read, one write; some eight products and sums per element."""
    return copied(case), 8 * elements(case)


def naive(inputs: dict[str, Any]) -> tuple[str, Callable[[], Any]]:
    """Torch's norm, and its output steered: what a hook on the norm gives."""
    given = dict(inputs)
    x, kind, channel = given.pop("x"), given.pop("kind"), inputs["channel_dim"]
    weight, bias, groups = given.pop("weight").to(x.dtype), given.pop("norm_bias", None), given.pop("groups", 1)
    weight = weight + 1 if given.pop("plus_one", False) else weight
    bias = None if bias is None else bias.to(x.dtype)
    width = weight.shape

    def call() -> Tensor:
        if kind == "group":
            n = F.group_norm(x, groups, weight, bias)
        else:
            moved = x.movedim(channel, -1)
            n = F.rms_norm(moved, width, weight, 1e-5) if kind == "rms" else F.layer_norm(moved, width, weight, bias)
            n = n.movedim(-1, channel)
        return affine_shift(n, **given, out=None if torch.is_grad_enabled() else n)

    return "torch's norm, then affine_shift in place", call
