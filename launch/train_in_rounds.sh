#!/usr/bin/env bash
# rounds=4 questions=4000 bash launch/train_in_rounds.sh --work_dir work/rounds \
#     --instruct_model_path /models/start --reward_model_path /models/reward \
#     --dataset_path questions.parquet
#
# Trains a model in rounds: the model answers the next `questions`, pairs are made of its answers, it
# is trained on them, and the trained model answers those of the next round. Any flag of
# `stream-engine run --help` can be given, or stand in a file (--config run.yaml, without `rounds` in
# it: their models are made here); with --demo and nothing else it runs the embedded world.
#
#     answer and pair    stream-engine round WORK_DIR --round 2    ──▶ work_dir/rounds/2/dataset
#     train              train DATASET MODEL OUT                   ──▶ models/round-2
#
# `train` is a program, or a file of python, that trains MODEL on DATASET and writes the checkpoint to
# OUT; launch/train_dpo.py is one, by TRL. OUT is the same folder when it is started again, so that
# a training that was killed goes on from its last checkpoint.
#
# Killed anywhere and started again it goes on where it was: a round's answers, pairs and model are
# made once. A model is complete when it bears its name: it is trained as round-2.partial.

set -euo pipefail

rounds="${rounds:-4}"
questions="${questions:-}"   # of each round; empty: 75 in the demo, else 4000
train="${train:-}"           # empty: launch/train_dpo.py, in the demo `stream-engine demo loop`
train_flags="${train_flags:-}" # more of its words, as "--epochs 2 --learning_rate 1e-6"
train_python="${train_python:-}" # runs a `train` that ends in .py; empty: this repository's own
train_on="${train_on:-newest}" # the pairs of the newest round | those of all
train_from="${train_from:-newest}" # the newest model | the first one, each time anew
models_dir="${models_dir:-}" # empty: beside the work directory, WORK_DIR-models
nproc_per_node="${nproc_per_node:-}" # workers; empty: one a GPU, or 2 without GPUs

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

fail() {
    echo "train_in_rounds.sh: $1" >&2
    exit 1
}

config="$(value_of config "" "$@")"
their_rounds="$(in_file "$config" rounds "")"
[ -z "$their_rounds" ] ||
    fail "$config: leave \`rounds\` out, whose models are made here; \`stream-engine run\` takes them"

demo=false
[[ " $* " != *" --demo "* ]] || demo=true
work_dir="$(in_file "$config" work_dir work/rounds)"
work_dir="$(value_of output_dir "$work_dir" "$@")"
work_dir="$(value_of work_dir "$work_dir" "$@")"
first="$(in_file "$config" instruct_model_path "")"
first="$(value_of instruct_model_path "$first" "$@")"
flags=("$@" --work_dir "$work_dir")
if [ "$demo" = true ]; then
    first="${first:-$("$python" -c 'from stream_engine.demo import checkpoint_path as c; print(c("instruct"))')}"
    questions="${questions:-75}"
fi
[ -n "$first" ] || fail "give --instruct_model_path, the model to begin with"
format="$(in_file "$config" format "")"
[ -n "$(value_of format "$format" "$@")" ] || flags+=(--format trl)
questions="$(in_file "$config" questions "${questions:-4000}")"
questions="$(value_of questions "$questions" "$@")"
launcher="$(value_of launcher "" "$@")"
models_dir="${models_dir:-$work_dir-models}"
[[ "$models_dir" != *://* ]] || fail "set models_dir to a folder of a disk: models are trained there"
[ "$train_on" = newest ] || [ "$train_on" = all ] || fail "train_on is newest or all, not $train_on"

[ -n "$nproc_per_node" ] || nproc_per_node="$(num_gpus)"
[ "$nproc_per_node" -gt 0 ] || nproc_per_node=2
cores_each=$(($(num_cores) / nproc_per_node))
omp_num_threads="${OMP_NUM_THREADS:-$((cores_each > 0 ? cores_each : 1))}"

# Two of these at once would train one model twice. What this script starts holds the lock, too; what
# was killed a moment ago may still be on its way out.
mkdir -p "$models_dir"
exec 9>"$models_dir/lock"
flock --wait 3 9 || fail "another is at work in $models_dir, or what it started still is"

# answer ROUND MODEL: the round's questions answered and paired; nothing to do where they are.
answer() {
    local workers=()
    [ "$nproc_per_node" -eq 1 ] || [ "$launcher" = ray ] ||
        workers=(-m torch.distributed.run --standalone --nproc_per_node "$nproc_per_node")
    OMP_NUM_THREADS="$omp_num_threads" "$python" "${workers[@]}" -m stream_engine round "${flags[@]}" \
        --round "$1" --instruct_model_path "$2" --questions "$questions" --failures_ok
}

# train_model DATASET MODEL OUT: by the user's program, or the one that fits.
train_model() {
    local more
    read -r -a more <<<"$train_flags"
    if [ -z "$train" ] && [ "$demo" = true ]; then
        rm -rf "$3"
        "$python" -m stream_engine demo loop "$1" --model "$2" --out "$3" --steps 40 "${more[@]}"
    elif [ -z "$train" ]; then
        "${train_python:-$python}" "$root/launch/train_dpo.py" "$@" "${more[@]}"
    elif [[ "$train" == *.py ]]; then
        "${train_python:-$python}" "$train" "$@" "${more[@]}"
    else
        "$train" "$@" "${more[@]}"
    fi
}

model="$first"
for round in $(seq "$rounds"); do
    trained="$models_dir/round-$round"
    if [ ! -d "$trained" ]; then
        echo "round $round: $model answers $questions questions" >&2
        answer "$round" "$model"
        dataset="$work_dir/rounds/$round/dataset"
        [ "$train_on" = newest ] || dataset="$work_dir/dataset"
        [ "$train_from" = newest ] || model="$first"
        echo "round $round: $model is trained on $dataset" >&2
        train_model "$dataset" "$model" "$trained.partial"
        [ -d "$trained.partial" ] || fail "the training wrote nothing to $trained.partial"
        sync "$trained.partial" 2>/dev/null || true
        mv "$trained.partial" "$trained"
    fi
    model="$trained"
done

status=0
"$python" -m stream_engine status "$work_dir" --check || status=$?
echo "$model"
exit "$status"
