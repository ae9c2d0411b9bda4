#!/usr/bin/env bash
# bash launch/deepspeed.sh --demo --work_dir work/deepspeed_demo
#
# The same run under the deepspeed launcher; all arguments are those of `stream-engine run`.
# hostfile=FILE runs on several nodes ("host0 slots=8" a line), over ssh.

set -euo pipefail

hostfile="${hostfile:-}"
num_workers="${num_workers:-}" # workers a node; empty: one a GPU, or 2 without GPUs
master_port="${master_port:-29510}"

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

gpus="$(num_gpus)"
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    num_workers="${num_workers:-2}"
fi
launcher=(--num_accelerators "${num_workers:-$gpus}")
[ -z "$hostfile" ] || launcher=(--hostfile "$hostfile")
cores_each=$(($(num_cores) / ${num_workers:-$gpus}))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores_each > 0 ? cores_each : 1))}"

export PATH="$venv/bin:$PATH"
exec deepspeed "${launcher[@]}" --master_port "$master_port" --module stream_engine run "$@"
