"""Small runs of each pipeline with their reports, and a real browser to look at them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import DEMO_FLAGS
from tests.processes import run_rank

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PIPELINES = ("dpo_reward", "divide_and_conquer", "llava_critic")


@pytest.fixture(scope="session")
def run_of(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished demo run of a pipeline, made when it is first asked for. Read only."""
    runs = {"dpo_reward": demo_run}

    def run(pipeline: str) -> Path:
        if pipeline not in runs:
            from stream_engine.demo.data import write_dataset

            folder = tmp_path_factory.mktemp(pipeline)
            questions = write_dataset(folder / "questions.parquet", count=6, seed=5)
            words = ["run", *DEMO_FLAGS, "--pipeline_name", pipeline]
            words += ["--dataset_path", questions, "--work_dir", folder / "run"]
            status = run_rank(words, log=folder / "log")
            assert status == 0, (folder / "log").read_text()
            runs[pipeline] = folder / "run"
        return runs[pipeline]

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Chromium, driven by playwright."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()
