#!/usr/bin/env bash
# bash launch/gpu_check.sh OUT [--minutes 9] [--rehearse]
#
# All that needs a GPU, in one command of nine minutes: tests, the demo, speed against named baselines,
# a profile. OUT/summary.json says what was found, also of a run that is cut off; read it as
# kernels/benchmarks/results/README.md says. `--rehearse` runs every step small and on CPU. It takes a
# python that has torch already, with what else is missing from the wheels that launch/gpu_wheels.sh
# fetched, or else the repository's own .venv.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
out="$(realpath -m "${1:?OUT, a folder for what is found}")"
shift
wheels="${WHEELS:-$root/.wheels}"
python="${PYTHON:-python3}"

if [ -x "$venv/bin/stream-engine" ] || ! "$python" -c 'import torch' 2>/dev/null; then
    source "$root/launch/environment.sh" dev
elif [ -d "$wheels" ]; then
    site="$(mktemp -d)"
    for name in $("$python" "$root/launch/gpu_needs.py" --missing); do
        # One by one: what has no wheel is missed by the step that needs it.
        "$python" -m pip install --quiet --no-index --no-deps --no-compile \
            --find-links "$wheels" --target "$site" "$name" || echo "$name: no wheel in $wheels" >&2
    done
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
cd "$root"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m tests.gpu "$out" "$@"
