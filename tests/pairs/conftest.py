"""A run with results, from which pairs can be merged."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_engine.run_dir.paths import RunDir
from tests.synthetic import write_example_run


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return write_example_run(tmp_path / "run")
