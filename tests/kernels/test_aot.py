"""Machine code of the kernels without a GPU: every Triton kernel and .cu file, for all architectures we build for."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TRITON = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
CUDA = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
TRITON_ARCHITECTURES = ("80", "90", "100")
CUDA_ARCHITECTURES = ("80", "90a", "100")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("op", TRITON)
def test_triton_reads_16_bytes_and_spills_nothing(op: str) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), op, *TRITON_ARCHITECTURES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {str(each["arch"]) for each in found} == set(TRITON_ARCHITECTURES)
    assert [each for each in found if each["missing"] or each["stack"] or each["local"] or each["spilled"]] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("op", CUDA)
def test_cuda_spills_nothing(op: str) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "op.o")
        command = ["nvcc", "-O3", "-std=c++17", "-Xptxas=-v", "-c", *targets, *include, "-o", str(target)]
        done = subprocess.run([*command, str(ROOT / f"csrc/{op}.cu")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert len(used) >= len(CUDA_ARCHITECTURES)
        assert {numbers for numbers in used if any(map(int, numbers))} == set()
        check_sass(target)


def check_sass(target: Path) -> None:
    """Every architecture reads and writes the activation 16 bytes at a time, where there is a tool to look."""
    spec = find_spec("triton")
    cuobjdump = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    if cuobjdump is None or not cuobjdump.is_file():
        return
    for arch in CUDA_ARCHITECTURES:
        command = [cuobjdump, "-sass", "-arch", f"sm_{arch}", target]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = [part for part in code.split("Function : ")[1:] if re.match(r"\S*Li[48]E", part)]
        assert functions, f"no kernel with packs for sm_{arch}"
        for function in functions:
            assert "LDG.E.128" in function
            assert "STG.E.128" in function
            assert not re.search(r"STG\.E(\.U16)? ", function), f"narrow writes in {function[:80]} for sm_{arch}"
