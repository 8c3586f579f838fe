"""What is measured of `mlp_shift`: a network of the size that a learned transport map has."""

from bench.registry import BF16, BOTH, CPU, Row, copied, copy_of_x, elements
from pysteer.ops import Case

ROWS = [
    Row("mlp_shift", Case(2, 512, 1024, BF16, strength="one"), BOTH, "residual"),
    Row("mlp_shift", Case(2, 512, 1024, BF16, strength="one", sizes={"hidden": 256}), CPU, "residual"),
    Row("mlp_shift", Case(32, 64, 1024, BF16, strength="one", sizes={"hidden": 64}), CPU, "place"),
    Row("mlp_shift", Case(4, 1024, 320, BF16, "channels_first", "one", sizes={"hidden": 64}), CPU, "residual"),
]
floor = copy_of_x


def cost(case: Case) -> tuple[int, int]:
    """Two reads, one write; two sums per element, and the products of a network per row."""
    hidden = case.sizes.get("hidden", 6)
    return copied(case) // 2 * 3, 2 * elements(case) + case.rows * 2 * hidden * (2 * case.width + hidden)
