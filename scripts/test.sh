#!/usr/bin/env bash
# Makes the environment and runs the tests; arguments go to pytest:
#   scripts/test.sh
#   scripts/test.sh tests/ops -k affine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

make_environment "${PYSTEER_EXTRA:-test}"
exec "$python" -m pytest "$@"
