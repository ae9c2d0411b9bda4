#!/usr/bin/env bash
# bash launch/test.sh
#
# Runs the tests, on any machine; arguments go to pytest (`bash launch/test.sh tests/inputs -x`).

set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev

cd "$root"
# One thread a process: the tests start many processes, and more threads only make them wait.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# As many at once as there are cores; `jobs=0` runs them in one process, one after the other.
exec "$python" -m pytest --numprocesses "${jobs:-$(num_cores)}" "$@"
