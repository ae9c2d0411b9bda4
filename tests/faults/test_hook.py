"""The hook sees what the kernel is asked to change below a work directory, and nothing less."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.scenes import SCENES, Stage

RECORD = """
import os, sys
from collections import Counter
from pathlib import Path
import tests.faults.warm
from stream_engine import pipelines
from stream_engine.cli.main import main
from tests.faults.hook import Hook
work, told, *words = sys.argv[1:]
pipelines.PIPELINES["echo"] = "tests.echo_pipeline:EchoPipeline"
hook = Hook(Path(work), deed="record", told=Path(told))
hook.install()
status = main(words)
calls = Counter({"create": "open"}.get(one.call, one.call) for one in hook.changes)
print(*(f"{call}={calls[call]}" for call in sorted(calls)), flush=True)
os._exit(status)
"""
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="see hook.py: pathlib")
CALLS = {
    **{name: name for name in ("link", "symlink", "rename", "rmdir", "mkdir", "fsync", "unlink")},
    **{"linkat": "link", "symlinkat": "symlink", "renameat": "rename", "renameat2": "rename"},
    **{"mkdirat": "mkdir", "utimensat": "utime", "unlinkat": "unlink", "openat": "open"},
    **{"write": "write", "pwrite64": "write", "writev": "write", "fdatasync": "fsync"},
    **{"truncate": "truncate", "ftruncate": "truncate", "sendfile": "write"},
    **{"copy_file_range": "write", "fallocate": "write", "mmap": "write"},
}
"""System calls, and what the hook calls them."""


def whole_lines(trace: Path) -> Iterator[str]:
    """A line a call; where threads take turns one is told in two parts."""
    begun: dict[str, str] = {}
    for line in trace.read_text(errors="replace").splitlines():
        thread = line.split()[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line
        elif " resumed>" in line:
            yield begun.pop(thread, line) + line.partition(" resumed>")[2]
        else:
            yield line


def seen_by_strace(trace: Path, work: Path) -> Counter[str]:
    """The calls that changed something below a folder."""
    found: Counter[str] = Counter()
    for line in whole_lines(trace):
        begin = re.match(r"\d+ +(\w+)\(", line)
        if begin is None or str(work) not in line or " = -1 " in line:
            continue
        call = CALLS[begin[1]]
        target = re.match(r"\d+ +\w+\(\d+<([^>]*)", line)
        if call == "open" and not re.search("O_CREAT|O_TRUNC", line):
            continue
        if begin[1] == "mmap" and not ("MAP_SHARED" in line and "PROT_WRITE" in line):
            continue
        is_elsewhere = target is None or not target[1].startswith(str(work))
        if call == "write" and begin[1] != "mmap" and is_elsewhere:
            continue
        found["rmdir" if "AT_REMOVEDIR" in line else call] += 1
    return found


@pytest.mark.skipif(not shutil.which("strace"), reason="there is no strace")
def test_the_kernel_is_asked_for_no_change_that_the_hook_does_not_see(tmp_path: Path) -> None:
    stage, scene = Stage(tmp_path / "stage"), SCENES["run"]
    _, work = stage.copy(scene.before)
    traced = ["strace", "-y", "-f", "--seccomp-bpf", "-o", str(tmp_path / "trace")]
    traced += ["-e", f"trace={','.join(CALLS)}"]
    words = [sys.executable, "-c", RECORD, str(work), str(tmp_path / "told")]
    words += stage.words(scene.command, work)
    done = subprocess.run([*traced, *words], cwd=ROOT, capture_output=True, text=True)
    if "ptrace" in done.stderr:
        pytest.skip("nothing may be traced here")
    assert done.returncode == 2, done.stderr
    told = (one.split("=") for one in done.stdout.splitlines()[-1].split())
    by_hook = Counter({call: int(count) for call, count in told})
    by_strace = seen_by_strace(tmp_path / "trace", work)
    assert by_strace["write"] > 20 and by_strace["link"] > 10
    # A log that is opened again is asked to be made, and nothing changes.
    assert by_strace.pop("open") >= by_hook.pop("open")
    assert by_strace == by_hook
