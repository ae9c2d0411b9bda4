"""Step `suites`: the tests that need a GPU, with Triton compiled; a pytest each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from tests.gpu import tally
from tests.gpu.runner import ROOT
from tests.gpu.step import Kit

ENGINE = ["tests/engine/test_cuda.py", "tests/models/test_cuda.py", "tests/work/test_cuda.py"]
SUITES = {
    "engine": [*ENGINE, "-k", "not really_out"],
    "memory": ["tests/engine/test_cuda.py", "-k", "really_out"],
    "kernels": ["tests/kernels/triton_forms"],
}
SHARES = {"engine": 0.65, "memory": 0.4, "kernels": 1.0}
"""Of the time that is left, what a suite may take."""
ALONE = ("memory",)
"""Not beside other tests: it takes all of the card's memory."""
QUICK = {
    "engine": [*ENGINE, "-k", "gqa-one-row or gqa-80-float16 or llava_critic or sigterm"],
    "kernels": ["tests/kernels/triton_forms/test_attention.py", "-k", "16-16"],
}
"""What a rehearsal runs of them."""
AT_ONCE = 6


def run(kit: Kit) -> None:
    for name, words in (QUICK if kit.rehearse else SUITES).items():
        kit.part(name, lambda name=name, words=words: suite(kit, name, words), needs_s=15)


def suite(kit: Kit, name: str, words: list[str]) -> dict[str, Any]:
    """What pytest counted; raises when a test failed, or none ran."""
    path = kit.scratch / f"tally_{name}.json"
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.tally", "-p", "no:cacheprovider"]
    command += ["--tb=short", "-W", "ignore", *words]
    if importlib.util.find_spec("xdist") and not kit.rehearse and name not in ALONE:
        # A test that hangs in a kernel ends its process, which is replaced, and is told by name.
        command += ["--numprocesses", str(AT_ONCE), "-o", "timeout=60"]
        command += ["-o", "timeout_method=thread"]
    timeout_s = max(5.0, SHARES[name] * (kit.seconds_left - 3))
    variables = os.environ | {tally.VARIABLE: str(path)}
    try:
        rc: int | None = subprocess.run(
            command, cwd=ROOT, env=variables, timeout=timeout_s
        ).returncode
    except subprocess.TimeoutExpired:
        rc = None
    found = json.loads(path.read_text()) if path.exists() else {}
    kit.keep(**{name: found})
    assert rc == 0, f"pytest ended with {rc}; None: no time was left"
    assert found.get("passed"), "no test has run"
    return found
