# Sourced by the other scripts: makes the virtual environment and installs pysteer into it, once.
#
# Settings, all optional:
#   PYSTEER_PYTHON       the Python to use (3.11 or 3.12)
#   PYSTEER_VENV         folder of the environment, .venv by default
#   PYSTEER_TORCH_INDEX  an extra package index for torch, for example PyTorch's CPU index

find_python() {
    local candidate without_headers=""
    for candidate in "${PYSTEER_PYTHON:-}" python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
            >/dev/null 2>&1 || continue
        # Without Python.h the extension cannot be built; such a Python is the second choice.
        if "$candidate" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; then
            echo "$candidate"
            return 0
        fi
        without_headers="${without_headers:-$candidate}"
    done
    if [ -n "$without_headers" ]; then
        echo "$without_headers has no Python.h: the compiled kernels are left out (install its -dev package to have them)" >&2
        echo "$without_headers"
        return 0
    fi
    echo "pysteer needs Python 3.11 or 3.12 with venv; set PYSTEER_PYTHON to one" >&2
    return 1
}

has_gpu() {
    [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }
}

# make_environment EXTRA: afterwards $python is the environment's Python, with pysteer-core[EXTRA] in it, editable.
# Nothing is installed again until the build files or what is wanted change; test covers demo, and dev covers both.
make_environment() {
    local venv="${PYSTEER_VENV:-.venv}" extra="$1" base covers one stamp options=()
    python="$venv/bin/python"
    if ! "$python" -c "" >/dev/null 2>&1; then
        base="$(find_python)" || return 1
        echo "making $venv with $("$base" --version)"
        "$base" -m venv --clear "$venv"
    fi
    case "$extra" in demo) covers="demo test dev" ;; test) covers="test dev" ;; *) covers="$extra" ;; esac
    stamp="$(cat pyproject.toml CMakeLists.txt csrc/*.* csrc/include/* | cksum)"
    for one in $covers; do
        [ "$(cat "$venv/pysteer-$one" 2>/dev/null)" != "$stamp" ] || return 0
    done
    options+=(--no-compile) # only what is imported gets compiled, when it is
    [ -t 1 ] || options+=(--quiet)
    if [ -n "${PYSTEER_TORCH_INDEX:-}" ]; then
        options+=(--extra-index-url "$PYSTEER_TORCH_INDEX")
    elif ! has_gpu && ! "$python" -c "import torch" >/dev/null 2>&1; then
        echo "no NVIDIA GPU here: PyTorch's CPU index in PYSTEER_TORCH_INDEX would make the download smaller"
    fi
    echo "installing pysteer-core[$extra] and what it needs (torch is large; this happens once)"
    CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc 2>/dev/null || echo 2)}" \
        "$python" -m pip --disable-pip-version-check install --no-input ${options[@]+"${options[@]}"} -e ".[$extra]"
    "$python" -c "import pysteer._C" 2>/dev/null ||
        echo "note: no compiled kernels here; 'pysteer env' tells what serves instead" >&2
    echo "$stamp" >"$venv/pysteer-$extra"
}
