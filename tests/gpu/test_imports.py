"""What a step does not need it does not import: a GPU machine may not have it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.gpu.runner import ROOT

ABSENT = (
    "accelerate",
    "datasets",
    "deepspeed",
    "moto",
    "psutil",
    "pyarrow",
    "s3fs",
    "trl",
    "xdist",
)
MODULES = [
    *(f"tests.gpu.{name}" for name in ("__main__", "machine", "suites", "models", "trace")),
    *(f"tests.{room}.test_cuda" for room in ("engine", "models", "work")),
    *("tests.kernels.triton_forms.test_attention", "linear_logp", "prefix_attention", "sampler"),
]


def test_the_steps_are_imported_without_what_they_do_not_need():
    """All but the demo's comparison, which reads the datasets that are written."""
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); import {', '.join(MODULES)}"
    paths = [ROOT, ROOT / "kernels", ROOT / "kernels/benchmarks"]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
