"""Shared by all tests: Triton runs in its interpreter where there is no GPU, and torch keeps to a few threads."""

import os
from pathlib import Path

import pytest
import torch

# Triton reads the variable when a kernel is decorated, so this must come before any kernel is imported. Tests that
# compile ahead of time do so in a process of their own with TRITON_INTERPRET=0.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
