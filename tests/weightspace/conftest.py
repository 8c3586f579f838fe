"""A folder of small adapters; helpers are in `small_adapters` in the folder above."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from small_adapters import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve adapters of two classes, in folders of their class."""
    for seed in range(12):
        write(tmp_path / "set" / f"class-{seed % 2}" / f"{seed:02d}.safetensors", seed, images=())
    return tmp_path / "set"
