"""Lets the tests here import their helpers, those of the tests of converters and those of the folder above."""

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "convert"), str(_HERE.parent)]
