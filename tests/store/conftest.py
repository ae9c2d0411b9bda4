"""What tests of the store share."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_engine.run_dir.paths import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)
