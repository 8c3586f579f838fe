"""The package imports anywhere, says what it is, and ships what it needs."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import pysteer
from pysteer.errors import InputError

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked} or name in {blocked}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
"""


def run_python(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)


def test_import_loads_nothing_heavy(root: Path) -> None:
    heavy = "{'torch', 'triton', 'numpy', 'transformers', 'rich', 'pysteer._C'}"
    done = run_python(f"import sys, pysteer, pysteer.cli; print(sorted({heavy} & set(sys.modules)))", root)
    assert done.stdout.strip() == "[]", done.stderr


def test_steering_works_without_triton_and_extension(root: Path) -> None:
    code = BLOCKED.format(blocked="('triton', 'pysteer._C')") + (
        "import torch, pysteer\n"
        "from pysteer.ops import affine_shift\n"
        "x = torch.randn(1, 3, 4); one = torch.ones(2, 4)\n"
        "slot = torch.tensor([[1]], dtype=torch.int32); strength = torch.ones(1, 1)\n"
        "y = affine_shift(x, one, one, slot, strength, torch.tensor(0))\n"
        "assert torch.allclose(y, x + 1), y\n"
        "print(pysteer.steer.__name__, pysteer.Plan.__name__)\n"
    )
    done = run_python(code, root)
    assert done.stdout.split() == ["steer", "Plan"], done.stderr


@pytest.mark.parametrize("name", pysteer.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(pysteer, name) is not None
    assert name in dir(pysteer)


def test_every_lazy_name_is_public() -> None:
    assert set(pysteer._ATTRIBUTES) | {"__version__", "zoo"} == set(pysteer.__all__)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pysteer.nonsense


def test_version_is_the_installed_one(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["name"] == "pysteer-core"
    try:
        installed = metadata.version("pysteer-core")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here")
    assert installed == pysteer.__version__


def test_dependencies_keep_torch_in_bounds(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    needed = [*project["project"]["dependencies"], *(word for words in extras for word in words)]
    assert [word for word in needed if word.startswith("torch")] == ["torch>=2.11,<2.14"]
    assert not any("torch" in word for word in project["build-system"]["requires"])


def test_kernels_do_not_shadow_the_package_of_that_name(root: Path) -> None:
    assert not (root / "kernels" / "__init__.py").exists()
    assert (root / "pysteer" / "kernels").resolve() == (root / "kernels").resolve()


def test_input_error_is_one_line() -> None:
    error = InputError("layer", value=12, allowed="0 to 11", fix="take\n one of them")
    assert str(error) == "layer: got 12; allowed: 0 to 11; fix: take one of them"
    assert isinstance(error, ValueError)
    assert str(InputError("nothing to do")) == "nothing to do"
    assert len(str(InputError("prompt", value="x" * 10_000))) < 200
