"""Lets the tests here import the helpers of tests/ops and of this folder."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "ops")]
