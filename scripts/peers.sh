#!/usr/bin/env bash
# Makes an environment for each package that the benchmark compares with, since they pin other versions than ours:
#   scripts/peers.sh                          all of them, into .peers/
#   scripts/peers.sh repeng steering-vectors  some of them
#
# Nothing is installed again when an environment is complete. PYSTEER_TORCH_INDEX works as in scripts/environment.sh,
# PYSTEER_PEERS names another folder. ml-act and the published Infinity are no packages: their ways of steering are
# written from the formulas in bench/baselines.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

folder="${PYSTEER_PEERS:-.peers}"
known=(repeng steering-vectors sae-lens eai-sparsify)

# versions PACKAGE: what pip is told; torch is ours, so that the same kernels run
versions() {
    local torch
    torch="$("${PYSTEER_VENV:-.venv}/bin/python" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null)"
    printf '%s\n' "$1" "torch==${torch:-2.13.0}" safetensors accelerate
    case "$1" in
        repeng) printf '%s\n' 'numpy<2' 'transformers<6' ;;
        steering-vectors) printf '%s\n' 'transformers<5' ;;
    esac
}

failed=0
[ $# -gt 0 ] || set -- "${known[@]}"
for name in "$@"; do
    case " ${known[*]} " in
        *" $name "*) ;;
        *) echo "peers: unknown package $name; allowed: ${known[*]}" >&2; exit 2 ;;
    esac
    [ ! -e "$folder/$name/complete" ] || { echo "peers: $name is there"; continue; }
    base="$(find_python)" || exit 1
    options=(--disable-pip-version-check --no-input --no-compile --quiet)
    [ -z "${PYSTEER_TORCH_INDEX:-}" ] || options+=(--extra-index-url "$PYSTEER_TORCH_INDEX")
    mapfile -t wanted < <(versions "$name")
    if "$base" -m venv --clear "$folder/$name" &&
        "$folder/$name/bin/python" -m pip install "${options[@]}" "${wanted[@]}"; then
        "$folder/$name/bin/python" -m pip freeze >"$folder/$name/complete"
        echo "peers: $name is ready in $folder/$name"
    else
        echo "peers: $name could not be installed; its rows will say so" >&2
        failed=1
    fi
done
exit $failed
