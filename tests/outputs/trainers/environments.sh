#!/usr/bin/env bash
# bash tests/outputs/trainers/environments.sh FOLDER
#
# Makes an environment each for ms-swift and LLaMA-Factory in FOLDER, from the package index, and
# prints the variables by which the tests find them. Needs uv (`pip install uv`).

set -euo pipefail

folder="${1:?give a folder}"
python_version="${python_version:-3.11}"
torch="${torch:-torch==2.13.0}"
torchvision="${torchvision:-torchvision==0.28.0}"

make() { # make NAME PACKAGE...
    local name="$1"
    shift
    uv venv --python "$python_version" "$folder/$name"
    uv pip install --python "$folder/$name/bin/python" "$torch" "$@"
    # with its dependencies it would bring another build of torch
    uv pip install --python "$folder/$name/bin/python" --no-deps "$torchvision"
}

make ms_swift ms-swift qwen_vl_utils
make llama_factory llamafactory
echo "export MS_SWIFT_PYTHON=$folder/ms_swift/bin/python"
echo "export LLAMA_FACTORY_PYTHON=$folder/llama_factory/bin/python"
