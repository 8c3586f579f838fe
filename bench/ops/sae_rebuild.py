"""What is measured of `sae_rebuild`: the smallest case, and the sizes of a small autoencoder."""

from bench.registry import BF16, CPU, FP32, Row, copied, copy_of_x, elements
from pysteer.ops import Case

SMALL = {"latents": 5120, "k": 32, "edits": 1}
ROWS = [
    Row("sae_rebuild", Case(2, 512, 1024, BF16, strength="one"), variant="drop"),
    Row("sae_rebuild", Case(2, 128, 640, BF16, strength="one", sizes=SMALL), variant="drop"),
    Row("sae_rebuild", Case(2, 128, 640, FP32, strength="one", sizes=SMALL), CPU, "threshold"),
]
floor = copy_of_x


def cost(case: Case) -> tuple[int, int]:
    """One read, one write; a product with all latents, and one back where all of them may be active."""
    return copied(case), 2 * elements(case) * case.sizes.get("latents", 12)
