#!/usr/bin/env bash
# bash launch/gpu_wheels.sh
#
# Fetches into .wheels/, which git ignores, what launch/gpu_check.sh needs on a GPU machine that has no
# package index: all but torch, triton, transformers, what these bring along, and pyarrow, which weighs
# 40 MiB and more, and without which whole runs, but no tests or figures of the engine, are missing
# (`also=pyarrow` fetches it too). A machine installs of these what it lacks. Ends with the size of all
# that travels, and fails above most_mib.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
wheels="${WHEELS:-$root/.wheels}"
python="${PYTHON:-python3}"
python_version="${python_version:-3.12}" # of the GPU machine
also="${also:-}"
most_mib="${most_mib:-60}"

rm -rf "$wheels"
mkdir -p "$wheels"
names="$("$python" "$root/launch/gpu_needs.py" | grep -vx pyarrow)"
# shellcheck disable=SC2086  # a word each
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$wheels" $names $also

bytes_of() { xargs -0 stat -c %s | awk '{ sum += $1 } END { printf "%d", sum }'; }
own="$(find "$wheels" -name '*.whl' -print0 | bytes_of)"
tracked="$(cd "$root" && git ls-files -z | bytes_of)"
total=$(((own + tracked) / 1048576))
echo "$wheels: $(find "$wheels" -name '*.whl' | wc -l) wheels, $((own / 1048576)) MiB; with the repository $total MiB"
[ "$total" -lt "$most_mib" ]
