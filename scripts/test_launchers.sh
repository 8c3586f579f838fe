#!/usr/bin/env bash
# Runs the tests of the SLURM and Ray launchers for real, on this machine alone. Needs root and Debian's packages for
# SLURM, and installs Ray into the environment of the tests; what cannot be had is named and its test skipped.
#   scripts/test_launchers.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment test

if ! command -v sbatch >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends munge slurm-wlm >/dev/null ||
        echo "SLURM is not to be had here" >&2
fi
"$python" -c "import ray" 2>/dev/null || "$python" -m pip --disable-pip-version-check install --quiet "ray>=2.40" ||
    echo "Ray is not to be had here" >&2

trap 'scripts/slurm_on_loopback.sh stop >/dev/null 2>&1 || true' EXIT
if command -v sbatch >/dev/null; then
    settings=$(scripts/slurm_on_loopback.sh start) && eval "$settings"
fi
"$python" -m pytest -rs tests/sweep/test_launchers.py "$@"
