"""The C of this folder as a library: built once a machine by its own compiler, and kept.

It lies in `__pycache__` beside the source, or in the user's cache folder where that cannot be
written to; its name tells the source that it was made of. Processes that want it at the same time
wait for the one that builds it, so that all of a machine take the same form. It needs a C compiler
and AVX-512; where one is missing `library` is None, and a line in the log says why.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stream_kernels import forms

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
COMPILERS = ("cc", "gcc", "clang")
OPENMP = ("libgomp", "libiomp", "libomp")


class UnavailableError(RuntimeError):
    """There is no library, for the reason given."""


@cache
def library() -> ctypes.CDLL | None:
    """The functions of the C files, or None where they cannot be had."""
    if forms.TORCH_ONLY or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    try:
        parallel()
        loaded = ctypes.CDLL(str(built()))
        runs_here = loaded.runs_here()
    except (UnavailableError, OSError, AttributeError) as error:
        logger.warning("no compiled form, torch's kernels are used, slower: %s", error)
        return None
    return loaded if runs_here else None


def function(
    name: str, arguments: type[ctypes.Structure], is_right: Callable[[Any], bool] | None = None
) -> Any:
    """A function of the library, which is called with a pointer to `arguments` and `parallel()`,
    and returns 0 where memory ran out; None where there is none, or it is not right here."""
    loaded = library()
    if loaded is None:
        return None
    found = getattr(loaded, name)
    found.argtypes = [ctypes.POINTER(arguments), ctypes.c_void_p]
    found.restype = ctypes.c_int64
    return found if is_right is None or agrees(name, lambda: is_right(found)) else None


def agrees(name: str, check: Callable[[], bool]) -> bool:
    """Whether a function of the library computes here what torch does; else a line in the log says
    that it is not used. `check` calls it with a small known case."""
    if check():
        return True
    logger.warning("the compiled %s is wrong on this machine: torch's, slower, is used", name)
    return False


@cache
def parallel() -> ctypes.c_void_p:
    """GOMP_parallel of the OpenMP that torch has loaded: its threads serve both.

    Raises:
        UnavailableError: where torch runs on other threads.
    """
    own = str(Path(torch.__file__).parent)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in maps}
    found = sorted(
        (path for path in paths if Path(path).name.startswith(OPENMP)),
        key=lambda path: (not path.startswith(own), path),
    )
    for path in found:
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
    raise UnavailableError("torch has loaded no OpenMP that has GOMP_parallel")


def built() -> Path:
    """The library's file; built first where there is none.

    Raises:
        UnavailableError: without a compiler, or a folder to keep the library in.
    """
    sources = sorted(FOLDER.glob("*.[ch]"))
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sources:
        digest.update(source.read_bytes())
    name = f"stream_kernels_cpu-{digest.hexdigest()[:16]}.so"
    folders = list(_folders())
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    for folder in folders:
        try:
            return _build([str(each) for each in sources if each.suffix == ".c"], folder / name)
        except OSError as error:
            logger.debug("%s holds no compiled library: %s", folder, error)
    raise UnavailableError(f"no folder to keep the library in: {', '.join(map(str, folders))}")


def _folders() -> Iterator[Path]:
    yield FOLDER / "__pycache__"
    with contextlib.suppress(RuntimeError):  # a user without a home
        cached = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        yield Path(cached) / "stream_kernels"


def _build(sources: list[str], target: Path) -> Path:
    """Compile into `target`'s folder, unless another process has done so meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(OSError):  # file systems without locks: both build, one stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
            if compiler is None:
                raise UnavailableError(f"no C compiler ({', '.join(COMPILERS)})")
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                command = [compiler, *FLAGS, *sources, "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    raise UnavailableError(f"{compiler} failed:\n{done.stderr[-2000:]}")
                with open(made, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(made, target)
    return target
