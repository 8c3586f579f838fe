#!/usr/bin/env bash
# Runs all benchmarks, stores the results, flags regressions and writes the tables; for a scheduled run:
#   scripts/bench.sh            one to two hours on two CPU cores; the same command goes on after an interruption
#   scripts/bench.sh --quick    small sizes
#
# The exit code says whether anything failed or got slower beyond the noise.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYSTEER_VENV:-.venv}/bin/python"
size=()
[ "${1:-}" != --quick ] || size=(--quick)
code=0

scripts/peers.sh || echo "bench: packages that could not be installed have no time" >&2
for part in speed effect; do
    "$python" -m "bench.$part" ${size[@]+"${size[@]}"} || code=1
    stored=$("$python" -c "from bench.record import stored; print(len(stored('$part')))")
    [ "$stored" -lt 2 ] || "$python" -m bench.compare "$part" || code=1
done
[ ${#size[@]} -gt 0 ] || { "$python" -m bench.generation && "$python" -m bench.language; } || code=1
"$python" -m bench.docs || code=1
exit $code
