#!/usr/bin/env bash
# Builds the CUDA kernels and checks and times the ops on a machine with an NVIDIA GPU, without any network:
#   scripts/gpu_check.sh --out DIR [--wheels DIR] [--python PYTHON]
#
# Needs Python 3.11 or 3.12 with torch and Triton, nvcc, CMake and a C++ compiler; installs nothing. pybind11 (to build)
# and pytest (for the whole test set) are taken from the folder of wheels where Python has none. A stage that cannot run
# says why and the next one goes on; DIR gets summary.json (a line per stage), logs and ops.json (the figures).
# Stages have time limits that add up to nine minutes.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out="" wheels="" python=python3
usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?"--out wants a folder"}; shift 2 ;;
        --wheels) wheels=${2:?"--wheels wants a folder"}; shift 2 ;;
        --python) python=${2:?"--python wants an interpreter"}; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) echo "gpu_check: unknown argument $1; allowed: --out DIR, --wheels DIR, --python PYTHON" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "gpu_check: --out DIR is missing: the folder that gets summary.json and ops.json" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
failed=0
stages=()

# note STAGE STATUS TEXT: one line on the screen, one in the summary
note() {
    echo "gpu_check: $1: $2${3:+ ($3)}"
    stages+=("$1" "$2" "${3:-}")
    [ "$2" != failed ] || failed=1
    "$python" - "$out/summary.json" "${stages[@]}" <<'END'
import json, sys
rows = [sys.argv[i : i + 3] for i in range(2, len(sys.argv), 3)]
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump([dict(zip(("stage", "status", "detail"), row)) for row in rows], file, indent=2)
END
}

# stage NAME SECONDS COMMAND...: run with a time limit, log to NAME.log
stage() {
    local name=$1 seconds=$2 started=$SECONDS code=0
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 25 "$out/$name.log"
    if [ $code = 0 ]; then
        note "$name" ok "$((SECONDS - started)) s"
    elif [ $code = 124 ] || [ $code = 137 ]; then
        note "$name" failed "stopped after $seconds s, see $name.log"
    else
        note "$name" failed "exit code $code, see $name.log"
    fi
    return $code
}

has() { "$python" -c "import $1" >/dev/null 2>&1; }

export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
has torch || { note machine failed "$python has no torch"; exit 1; }
capability=$("$python" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))' 2>"$work/why") ||
    { note machine skipped "no CUDA device: $(tail -n 1 "$work/why")"; exit 3; }
note machine ok "$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)')"

# The package stands in a folder of its own with the extension beside it; the checkout stays as it is.
mkdir -p "$work/site" && cp -rL "$root/pysteer" "$work/site/pysteer"
rm -f "$work"/site/pysteer/_C*.so
export PYTHONPATH="$work/site:$root:$root/tests/ops"
if [ -n "$wheels" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/extra" "$wheels"/*.whl \
        >"$out/wheels.log" 2>&1 || note wheels failed "see wheels.log"
    PYTHONPATH="$PYTHONPATH:$work/extra"
fi

build() {
    local architecture=$capability
    [ "$capability" != 90 ] || architecture=90a
    cmake -S "$root" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PROJECT_VERSION=0.0.0 -DPYSTEER_CUDA=ON \
        -DPYSTEER_CUDA_ARCHITECTURES="$architecture-real" -DPython_EXECUTABLE="$(command -v "$python")" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
        cmake --build "$work/build" --parallel && cp "$work"/build/_C*.so "$work/site/pysteer/"
}
if ! command -v cmake >/dev/null || ! command -v nvcc >/dev/null; then
    note build skipped "cmake and nvcc are both needed; the Triton kernels are checked alone"
elif ! has pybind11; then
    note build skipped "pybind11 is missing: give its wheel with --wheels; the Triton kernels are checked alone"
else
    export -f build
    export root work python capability
    stage build 130 bash -c build
fi

# -P keeps the checkout from hiding the package that was built.
cd "$root" || exit 1
"$python" -P -c "from pysteer.ops import backend_status; [print(f'  {n}: {s.reason or \"live\"}') for n, s in backend_status().items()]"
stage small 70 "$python" -P tests/ops/checking.py cuda
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        stage "$tool" 35 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -P tests/ops/checking.py cuda --only cuda --few
    done
else
    note sanitizer skipped "compute-sanitizer is not on PATH"
fi
if has pytest; then
    stage tests 100 "$python" -P -m pytest -q -p no:cacheprovider tests/ops/test_gpu.py
else
    note tests skipped "pytest is missing: give its wheels with --wheels; the stage \"small\" has compared every kernel"
fi
stage bench 100 "$python" -P -m bench.run --device cuda --rounds 20 --limit 75 --out "$out"
exit $failed
