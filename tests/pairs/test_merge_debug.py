"""Debug files: what the merge saw and decided, told apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from stream_engine.config import RunConfig
from stream_engine.pairs.merger import export
from stream_engine.run_dir.paths import RunDir
from tests.synthetic import FINGERPRINTS, SyntheticPipeline, run_merge, write_example_run


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return write_example_run(tmp_path / "run")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_debug_files_tell_rankings_pairs_and_drops_apart(run_dir: RunDir) -> None:
    """The ancestor wrote the rewards into the file named pairs."""
    report = run_merge(run_dir, debug=True)
    ranked = read_lines(run_dir.debug_dir / "ranked.jsonl")
    assert len(ranked) == 18
    for line in ranked:
        scored = [answer["score"] for answer in line["answers"] if "score" in answer]
        assert len(scored) == 9 and scored == sorted(scored, reverse=True)
        assert line["answers"][-1]["unscored"] == "no_tokens"
    pairs = read_lines(run_dir.debug_dir / "pairs.jsonl")
    drops = read_lines(run_dir.debug_dir / "drops.jsonl")
    assert len(pairs) + len(drops) == report.candidates
    refused = sum("rlaifv" in line["refused_by"] for line in pairs)
    assert len(pairs) - refused == report.written
    reasons = Counter(line["reason"] for line in drops)
    reasons["needs_one_image"] = refused
    assert reasons == Counter(report.dropped)
    assert all(line["chosen"]["score"] > line["rejected"]["score"] for line in pairs + drops)


def test_pairs_of_one_round_alone_are_written_without_debug_files(run_dir: RunDir) -> None:
    """Its lines were made and had no file to go to."""
    config = RunConfig.create({"debug": True})
    pipeline = SyntheticPipeline(config)
    report = export(run_dir, config, pipeline, FINGERPRINTS, format="trl", number=1)
    assert report.formats["trl"].written > 0
    assert not run_dir.debug_dir.exists()


def test_without_debug_no_debug_files_are_written(run_dir: RunDir) -> None:
    run_merge(run_dir)
    assert not run_dir.debug_dir.exists()
