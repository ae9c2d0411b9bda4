"""--reward_model_python_path: the reward stage under another interpreter.

Some reward models want other versions of some packages. The worker then does the rollouts itself,
starts `python -m stream_engine work WORK_DIR --run_stage 1` with the other interpreter as the same
rank, waits for it, and merges. The two meet in the run directory and nowhere else.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from stream_engine import __version__
from stream_engine.errors import ConfigError, StreamEngineError

logger = logging.getLogger(__name__)

PROBE = "import sys, stream_engine; print(sys.prefix); print(stream_engine.__version__)"
PROBE_TIMEOUT_S = 120


def find_python(setting: str | None) -> Path | None:
    """The interpreter that `reward_model_python_path` means; None when it is this very one.

    A path to an interpreter, a folder of an environment, or a conda environment's name.

    Raises:
        ConfigError: when there is none, or stream_engine of this version is not installed there.
    """
    if not setting:
        return None
    python = _resolve(setting)
    try:
        probe = subprocess.run(
            [str(python), "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"reward_model_python_path {setting}: cannot run it: {error}") from error
    lines = probe.stdout.split()
    if probe.returncode or len(lines) != 2:
        said = (probe.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ConfigError(
            f"reward_model_python_path {python} cannot import stream_engine ({said}); "
            f"install it there: {python} -m pip install stream-engine=={__version__}"
        )
    prefix, version = lines
    if version != __version__:
        raise ConfigError(
            f"reward_model_python_path {python} has stream_engine {version}, this is {__version__}"
        )
    return None if Path(prefix) == Path(sys.prefix) else python


def _resolve(setting: str) -> Path:
    path = Path(setting).expanduser()
    for candidate in (path, path / "bin" / "python"):
        if candidate.is_file():
            return candidate.absolute()  # not resolved: a venv's python is a link
    if path.name != setting:
        raise ConfigError(f"reward_model_python_path {setting} does not exist")
    conda = shutil.which("conda")
    if conda is None:
        raise ConfigError(
            f"reward_model_python_path {setting!r} is no file, and there is no conda to ask for an "
            "environment of that name; give the path of a python"
        )
    command = [conda, "run", "-n", setting, "python", "-c", "import sys; print(sys.executable)"]
    answer = subprocess.run(command, capture_output=True, text=True)
    found = Path(answer.stdout.strip() or ".")
    if answer.returncode or not found.is_file():
        raise ConfigError(f"conda knows no environment {setting!r}; `conda env list` shows them")
    return found


def run_rewards_under(python: Path, work_dir: str) -> None:
    """Do the reward stage of a run with another interpreter, as the same rank, and wait for it.

    Raises:
        StreamEngineError: when it ends with an error of its own (which it has printed).
    """
    command = [str(python), "-m", "stream_engine", "work", work_dir, "--run_stage", "1"]
    logger.info("rewards under %s", python)
    child = subprocess.Popen(command)
    try:
        status = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if status not in (0, 2):
        raise StreamEngineError(f"the reward stage under {python} ended with status {status}")
