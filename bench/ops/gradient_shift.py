"""What is measured of `gradient_shift`."""

from bench.registry import BF16, FP32, Row, copied, copy_of_x, elements
from pysteer.ops import Case

ROWS = [
    Row("gradient_shift", Case(16, 64, 192, FP32, strength="one", sizes={"prototypes": 64}), variant="one"),
    Row("gradient_shift", Case(2, 1024, 2048, BF16, strength="one", sizes={"prototypes": 16}), variant="gate"),
]
floor = copy_of_x


def cost(case: Case) -> tuple[int, int]:
    """One read, one write; a dot product per token and prototype, and twice the rank of the precision, here 3."""
    return copied(case), 2 * elements(case) * (case.sizes["prototypes"] + 2 * 3)
