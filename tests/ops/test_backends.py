"""Which kernels run, how to insist on one, and what is said where one is missing."""

import pytest
import torch

import pysteer
from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, backends, get, specs
from pysteer.ops.layouts import DTYPE_CODES


def test_status_gives_a_reason() -> None:
    status = backend_status()
    assert list(status) == ["reference", "cpu", "triton", "cuda"]
    assert status["reference"].live
    assert all(live != bool(reason) for live, reason in status.values())


def test_unknown_and_missing_backends() -> None:
    with pytest.raises(InputError, match="allowed: reference, cpu, triton, cuda"), backend("gpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="cuda is not available here"), backend("cuda"):
            pass


def test_backend_nests_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = get("affine_shift")
    inputs = spec.make_inputs(Case(2, 3, 8))
    automatic = spec.implementation(**inputs)
    with pysteer.backend("reference"):
        assert spec.implementation(**inputs) == "reference"
        with backend(None):
            assert spec.implementation(**inputs) == automatic
        assert spec.implementation(**inputs) == "reference"
    assert spec.implementation(**inputs) == automatic


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = get("affine_shift")
    inputs = spec.make_inputs(Case(2, 3, 8))
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setenv("PYSTEER_BACKEND", "reference")
    assert spec.implementation(**inputs) == "reference"
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setenv("PYSTEER_BACKEND", "fast")
    with pytest.raises(InputError, match="PYSTEER_BACKEND: got 'fast'"):
        spec.implementation(**inputs)


def test_ops_are_attributes_and_know_their_backends() -> None:
    for name, spec in specs().items():
        assert getattr(pysteer.ops, name) is spec.function
        assert set(spec.backends) <= set(backends.NAMES)
    with pytest.raises(InputError, match="unknown op: got 'shift'"):
        get("shift")


def test_without_the_extension_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = get("affine_shift")
    inputs = spec.make_inputs(Case(2, 3, 8))
    monkeypatch.setattr(backends, "_load_extension", lambda: (None, "the compiled extension does not load: no file"))
    monkeypatch.setattr(backends, "_choices", {})
    assert spec.implementation(**inputs) == "reference"
    assert not torch.equal(spec.function(**inputs), inputs["x"])
    assert backend_status()["cpu"].reason.endswith("no file")


@pytest.mark.skipif(not backend_status()["cpu"].live, reason="the compiled extension is not built")
def test_dtype_codes_are_those_of_the_extension() -> None:
    codes = backends.extension().DTYPES
    assert {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_CODES.items()} == codes
