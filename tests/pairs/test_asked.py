"""What was asked is what is exported: the words, and no marks of media that a trainer refuses."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from stream_engine.outputs.validate import validate
from stream_engine.pairs.rankings import as_asked
from stream_engine.run_dir.paths import RunDir
from tests.synthetic import run_merge, synthetic_rollouts, synthetic_sample, write_run


def test_the_row_says_what_the_model_was_asked(tmp_path: Path) -> None:
    """A model that sees its picture first was asked "Is  so?": so the trainer asks it, too."""
    sample = msgspec.structs.replace(synthetic_sample(0), question="Is <image> so?")
    rollouts = msgspec.structs.replace(synthetic_rollouts(sample), asked="Is  so?")
    assert as_asked(sample, rollouts).question == "Is  so?"
    assert as_asked(sample, synthetic_rollouts(sample)) == sample


@pytest.mark.parametrize(
    ("question", "is_seen", "by"),
    [
        ("What does <video> show?", True, ("ms_swift", "llama_factory")),
        ("What is in <bbox>?", True, ("ms_swift",)),
        ("Is <img>a.png</img> HTML?", False, ("ms_swift",)),
        ("Is <img>a.png</img> HTML?", True, ()),
    ],
)
def test_rows_that_spell_marks_of_media_are_dropped_for_trainers_that_work_by_marks(
    tmp_path: Path, question: str, is_seen: bool, by: tuple[str, ...]
) -> None:
    run_dir = RunDir(tmp_path)
    samples = [synthetic_sample(i) for i in range(2)]
    images = samples[0].images if is_seen else ()
    samples[0] = msgspec.structs.replace(samples[0], question=question, images=images)
    write_run(run_dir, samples)
    report = run_merge(run_dir, format=("trl", "ms_swift", "llama_factory"))
    written = {name: one.written for name, one in report.formats.items()}
    assert all((written[name] < written["trl"]) == (name in by) for name in written)
    for name in by:
        stats = json.loads((run_dir.export_dir(name) / "stats.json").read_text())
        assert stats["pairs"]["dropped"]["media_mark"] == written["trl"] - written[name] > 0
        assert validate(run_dir.export_dir(name)) == []
