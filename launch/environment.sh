# source launch/environment.sh [extra]
#
# Sets `python` to the interpreter of the repository's own .venv, which is made and filled when it is
# missing. VENV names another environment; PYTHON chooses the interpreter that makes it; `extra` is an
# optional dependency group (dev).

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
python="$venv/bin/python"
extra="${1:-}"

if [ ! -x "$venv/bin/stream-engine" ]; then
    echo "Making $venv (once; this downloads PyTorch) ..." >&2
    "${PYTHON:-python3}" -m venv "$venv"
    "$python" -m pip install --quiet --editable "$root${extra:+[$extra]}"
elif [ "$extra" = dev ] && ! "$python" -c 'import axe_playwright_python, hypothesis, kubernetes_validate, pytest, ray, ruff, trl, xdist' 2>/dev/null; then
    echo "Adding the development tools to $venv ..." >&2
    "$python" -m pip install --quiet --editable "$root[dev]"
fi

# Cores that this shell may use, and CUDA devices that torch can see.
num_cores() { "$python" -c 'import os; print(len(os.sched_getaffinity(0)))'; }
num_gpus() { "$python" -c 'import torch; print(torch.cuda.device_count())'; }

# value_of NAME DEFAULT ARGUMENTS...: the value of flag --NAME among the arguments, else DEFAULT.
value_of() {
    local name="$1" value="$2" previous=""
    shift 2
    for word in "$@"; do
        case "$word" in
            --"$name"=* | --"${name//_/-}"=*) value="${word#*=}" ;;
        esac
        case "$previous" in
            --"$name" | --"${name//_/-}") value="$word" ;;
        esac
        previous="$word"
    done
    printf '%s\n' "$value"
}

# in_file FILE NAME DEFAULT: a setting in a file of them (--config), else DEFAULT, as without a file.
in_file() {
    [ -n "$1" ] || { printf '%s\n' "$3" && return; }
    "$python" - "$@" <<'END'
import sys
from stream_engine.cli.run_file import by_our_names
from stream_engine.config_file import load_config_file
from stream_engine.errors import ConfigError

path, name, default = sys.argv[1:]
try:
    value = by_our_names(load_config_file(path)).get(name)
except ConfigError as error:
    sys.exit(f"stream-engine: {error}")
value = default if value is None else value
print(",".join(map(str, value)) if isinstance(value, list) else value)
END
}
