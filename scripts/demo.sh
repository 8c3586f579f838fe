#!/usr/bin/env bash
# Makes the environment and runs the main experiment on the bundled generator; arguments go to `pysteer run`:
#   scripts/demo.sh                       everything
#   scripts/demo.sh pairs=red->green cfg=4 --name mine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

has_gpu || export SKBUILD_CMAKE_DEFINE="${SKBUILD_CMAKE_DEFINE:-PYSTEER_CUDA=OFF}" # would only cost time here
make_environment demo
"$python" -m pysteer.cli run infinity-prototype "$@"
