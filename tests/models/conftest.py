"""Lets the tests here import their helpers `official` and `parity_case`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
