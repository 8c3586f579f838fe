"""The toy model's family is registered for these tests only; compiled graphs of one test do not reach the next."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from steering_toy import Toy, ToyFamily

from pysteer.families import base


@pytest.fixture(autouse=True)
def _toy_family() -> Iterator[None]:
    family = base.register(ToyFamily())
    yield
    base._FAMILIES.remove(family)


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> Toy:
    return Toy().eval()
