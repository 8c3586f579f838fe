"""Record what the published Infinity code computes on a small random model, for tests/models/test_parity.py.

    PYSTEER_OFFICIAL_INFINITY=<folder of FoundationVision/Infinity> python scripts/record_parity.py

Writes tests/models/fixtures/infinity_parity.safetensors. Needs einops and opencv beside the test dependencies.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

import official  # noqa: E402
import parity_case as case  # noqa: E402

from pysteer import files  # noqa: E402


def main() -> None:
    """Run the published code teacher-forced and greedily and write both summaries."""
    config = case.small_config()
    model = official.build(config, case.weights(config, case.SEED))
    text = case.texts(config, case.LENGTHS, case.SEED)
    bits = case.forced_bits(config, config.scales, len(case.LENGTHS), case.SEED)
    tensors = {}
    for mode, forced in (("forced", bits), ("greedy", None)):
        run = official.generate(
            model,
            config.scales,
            official.pack_text(text.hidden, text.lengths.tolist()),
            cfg=[case.CFG] * len(config.scales),
            tau=[case.TAU] * len(config.scales),
            forced=forced,
        )
        run.bits = forced or run.bits
        tensors.update({f"{mode}.{name}": tensor for name, tensor in case.summary(run).items()})
        margin = min(logits.unflatten(-1, (-1, 2)).diff(dim=-1).abs().min().item() for logits in run.logits)
        print(f"{mode}: smallest difference between the two logits of a bit {margin:.1e}")
    path = files.write_safetensors(case.FIXTURE, tensors)
    print(f"{path.relative_to(ROOT)}: {len(tensors)} tensors, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
