#!/usr/bin/env bash
# nnodes=2 node_rank=0 master_addr=host0 bash launch/torchrun_multi_node.sh --work_dir /nfs/run1 --dataset_path ...
#
# Run the same line on every node, with its own node_rank. The nodes share nothing but the work
# directory: a file system that all of them see, or object storage (--work_dir s3://bucket/run1). A node
# that dies does not stop the others; run the line again to resume, with any number of nodes.
#
# A worker that is killed for memory, crashes or loses its GPU makes torchrun start this node's workers
# again, up to max_restarts times; they take up where they were, and other nodes go on meanwhile. Eight
# are enough to find one record that kills its worker (after the seventh death it is set aside).
# Records and shards that failed are named at the end, and by `stream-engine status WORK_DIR --check`.

set -euo pipefail

nnodes="${nnodes:-1}"
node_rank="${node_rank:-0}"
master_addr="${master_addr:-127.0.0.1}"
master_port="${master_port:-29511}"
max_restarts="${max_restarts:-8}"
nproc_per_node="${nproc_per_node:-}" # workers on this node; empty: one a GPU, or 2 without GPUs

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[ -n "$nproc_per_node" ] || nproc_per_node="$(num_gpus)"
[ "$nproc_per_node" -gt 0 ] || nproc_per_node=2
cores_each=$(($(num_cores) / nproc_per_node))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores_each > 0 ? cores_each : 1))}"

# A wrong setting ends the script here, not after max_restarts tries.
"$python" -m stream_engine plan "$@"

# --failures_ok: torchrun takes any other status for a crash and starts the workers again.
exec "$python" -m torch.distributed.run --nnodes "$nnodes" --node_rank "$node_rank" \
    --nproc_per_node "$nproc_per_node" --master_addr "$master_addr" --master_port "$master_port" \
    --max_restarts "$max_restarts" -m stream_engine run "$@" --failures_ok
