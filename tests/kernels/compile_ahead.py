"""Compile the Triton kernels of one op for GPUs that need not be there, and print what the machine code looks like.

A script of its own, because Triton must not be in interpreter mode: python compile_ahead.py <op> <architecture>...
Prints one JSON object per kernel and architecture: name, arch, missing (wanted instructions that are not there),
registers, stack and local (bytes per thread), spilled (instructions); the last three are 0 without spills.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(entry: dict[str, Any], arch: int) -> bytes:
    """Return the machine code of one entry of a kernel file's AHEAD_OF_TIME list."""
    kernel = entry["kernel"]
    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={name: entry["signature"].get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in entry["constants"].items()},
        attrs={(names.index(name),): aligned for name in entry["divisible"] if name in entry["signature"]},
    )
    options = {"num_warps": entry["warps"], "num_stages": entry.get("stages", 3)}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


def inspect(entry: dict[str, Any], arch: int) -> dict[str, Any]:
    """Compile one entry and look for what it wants."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(entry, arch))
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    sizes = {name: int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL")}
    missing = [wanted for wanted in entry["wants"] if not re.search(wanted, code)]
    spilled = len(re.findall(r"\b(?:LDL|STL)\b", code))
    found = {"registers": sizes["REG"], "stack": sizes["STACK"], "local": sizes["LOCAL"], "spilled": spilled}
    return {"name": entry["name"], "arch": arch, "missing": missing, **found}


if __name__ == "__main__":
    op, *architectures = sys.argv[1:]
    for each in importlib.import_module(f"pysteer.kernels.{op}").AHEAD_OF_TIME:
        for architecture in architectures:
            print(json.dumps(inspect(each, int(architecture))), flush=True)
