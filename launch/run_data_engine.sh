#!/usr/bin/env bash
# bash launch/run_data_engine.sh
#
# Builds a DPO dataset and prints its path. As it stands, with no model and no dataset given, it runs
# the embedded demo: tiny models and drawn pictures, on any machine. For your own models and data set
# instruct_model_path, reward_model_path and dataset_path: all three, below in this file, in the
# environment (`sample_k=5 bash launch/run_data_engine.sh`) or as flags, which win
# (`bash launch/run_data_engine.sh --instruct_model_path /models/llava-v1.5-7b ...`).
# Any flag of `stream-engine run --help` can be given. Run it again to resume.

set -euo pipefail

pipeline_name="${pipeline_name:-dpo_reward}" # dpo_reward | divide_and_conquer | llava_critic
work_dir="${work_dir:-}"                     # work/demo for the demo, else work/$pipeline_name
dataset_path="${dataset_path:-}"             # parquet, jsonl, datasets folder or tars
instruct_model_path="${instruct_model_path:-}"
instruct_model_name="${instruct_model_name:-}"
reward_model_path="${reward_model_path:-}" # divide_and_conquer: auto_check,question_change,split
reward_model_name="${reward_model_name:-}"
reward_model_python_path="${reward_model_python_path:-}"
run_stage="${run_stage:-}" # 0 sample, 1 reward, 2 pairs; empty: all
sample_k="${sample_k:-10}"
rank="${rank:-3}"
distance="${distance:-25}"
strict_follow_rank="${strict_follow_rank:-false}"
debug="${debug:-false}"

nproc_per_node="${nproc_per_node:-}" # workers; empty: one a GPU, or 2 without GPUs

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

config="$(value_of config "" "$@")"
pipeline_name="$(in_file "$config" pipeline_name "$pipeline_name")"
pipeline_name="$(value_of pipeline_name "$pipeline_name" "$@")"
work_dir="${work_dir:-$(in_file "$config" work_dir "")}"
run_stage="$(value_of run_stage "$run_stage" "$@")"
dataset_path="$(value_of dataset_path "$dataset_path" "$@")"
own="$config$(value_of vision_tower_path "" "$@")" # whatever names a model or a dataset
for name in dataset_path instruct_model_path instruct_model_name reward_model_path \
    reward_model_name reward_model_python_path; do
    own+="$(value_of "$name" "${!name}" "$@")"
done
flags=()
demo=false
if [[ " $* " == *" --demo "* ]]; then
    demo=true
elif [ -z "$own" ]; then
    demo=true
    flags+=(--demo)
fi
if [ "$demo" = true ]; then
    work_dir="${work_dir:-work/demo}"
    [ "$pipeline_name" = dpo_reward ] || [ "$work_dir" != work/demo ] || work_dir="work/demo_$pipeline_name"
fi
work_dir="$(value_of output_dir "${work_dir:-work/$pipeline_name}" "$@")"
work_dir="$(value_of work_dir "$work_dir" "$@")"

if [ -z "$config" ]; then
    flags+=(--pipeline_name "$pipeline_name" --sample_k "$sample_k" --rank "$rank")
    flags+=(--distance "$distance" --strict_follow_rank "$strict_follow_rank" --debug "$debug")
fi
for name in dataset_path instruct_model_path instruct_model_name reward_model_path \
    reward_model_name reward_model_python_path run_stage; do
    [ -z "${!name}" ] || flags+=("--$name" "${!name}")
done
flags+=("$@" --work_dir "$work_dir")

# Checks every setting and shows what will be done, before any worker starts.
"$python" -m stream_engine plan "${flags[@]}"

[ -n "$nproc_per_node" ] || nproc_per_node="$(num_gpus)"
[ "$nproc_per_node" -gt 0 ] || nproc_per_node=2
cores_each=$(($(num_cores) / nproc_per_node))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores_each > 0 ? cores_each : 1))}"

# --failures_ok: torchrun takes any other status for a crash; `status --check` below tells.
"$python" -m torch.distributed.run --standalone --nproc_per_node "$nproc_per_node" \
    -m stream_engine run "${flags[@]}" --failures_ok

status=0
"$python" -m stream_engine status "$work_dir" --check >/dev/null || status=$?
if [ "$demo" = true ] && [ -z "$config$dataset_path$run_stage" ]; then
    echo "How good the pairs are, by the known truth of every picture:"
    "$python" -m stream_engine demo score "$work_dir"
fi
echo "$work_dir/dataset"
exit "$status"
