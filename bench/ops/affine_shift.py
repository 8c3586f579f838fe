"""What is measured of `affine_shift`."""

from bench.registry import BF16, BOTH, FP32, GPU, Row, copied, copy_of_x, elements
from pysteer.ops import Case

ROWS = [
    Row("affine_shift", Case(4, 1024, 2048, BF16, strength="one"), BOTH),
    Row("affine_shift", Case(16, 1024, 2048, BF16, strength="one")),
    Row("affine_shift", Case(4, 1024, 2048, FP32, strength="one")),
    Row("affine_shift", Case(4, 4096, 320, BF16, "channels_first", "one"), BOTH),
    Row("affine_shift", Case(16, 64, 192, FP32, strength="one")),
    Row("affine_shift", Case(32, 4096, 2048, BF16, strength="one"), GPU),
    Row("affine_shift", Case(32, 4096, 2048, FP32, strength="one"), GPU),
    Row("affine_shift", Case(64, 4096, 1280, BF16, "channels_first", "one"), GPU),
    Row("affine_shift", Case(4, 1024, 2048, BF16, strength="one"), BOTH, "bounded"),
    Row("affine_shift", Case(4, 1024, 2048, BF16, strength="one", options={"of_mean": True}), BOTH, "mean"),
    Row("affine_shift", Case(4, 1024, 2048, BF16, strength="one"), variant="mean-bounds"),
    *[
        Row("affine_shift", Case(4, 4096, 320, BF16, layout, "one", options={"of_mean": True}), BOTH, "bounded-mean")
        for layout in ("channels_first", "channels_last")
    ],
]
floor = copy_of_x


def cost(case: Case) -> tuple[int, int]:
    """One read, one write; a product and a sum per element. A shift of the mean reads twice and adds everything up."""
    of_mean = bool(case.options.get("of_mean"))
    return copied(case) // 2 * (2 + of_mean), (2 + of_mean) * elements(case)
