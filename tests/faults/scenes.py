"""What each command is given, and what a work directory holds that must not depend on harm.

A scene is a work directory as it was before a command, and that command. It is made once, and so is
the undisturbed outcome; each trial gets a copy.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
import pyarrow.parquet

from stream_engine.config import STAGES
from stream_engine.errors import StreamEngineError
from stream_engine.records import Failure
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import (
    RECORD_TYPES,
    read_header,
    read_quarantine,
    read_results,
)
from stream_engine.store import files
from tests.conftest import write_questions
from tests.faults.trial import Ended, run

FLAGS = (
    *("--pipeline_name=echo", "--sample_k=4", "--rank=2", "--samples_per_shard=4"),
    *("--retry_backoff_s=0", "--report=never"),
)
FIRST = [
    *("what is red", "aside from that", "how many are there", "flaky is this one"),
    *("unscored is that", "why is it so", "boom goes this", "who sits there"),
    *("where does it lead", "when was it drawn"),
]
OTHER = ["which is left", "what is red and round", "aside again", "is it new"]

Facts = dict[str, object]
"""What is compared: by name, anything that equals only its like."""


class Scene(NamedTuple):
    """A command and the state that it is given."""

    name: str
    before: tuple[str, ...]
    """Commands that make the state, by their names in `words_of`."""
    command: str


class Outcome(NamedTuple):
    """How a command ended, and what it left."""

    ended: Ended
    facts: Facts
    in_any_order: Facts


SCENES = {
    scene.name: scene
    for scene in (
        Scene("run", (), "run"),
        Scene("shard", (), "shard"),
        Scene("work", ("shard",), "work"),
        Scene("merge", ("shard", "work"), "merge"),
        Scene("merge again", ("run",), "merge rank 1"),
        Scene("append", ("run",), "append"),
        Scene("retry-failed", ("run", "supply"), "retry-failed"),
        Scene("overwrite", ("run",), "overwrite"),
        Scene("export", ("run",), "export"),
    )
}


class Stage:
    """Where scenes are made: inputs, states, undisturbed outcomes, and a folder for each trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, ...], Path] = {}
        self.outcomes: dict[tuple[str, ...], Outcome] = {}
        self.num_trials = 0
        for name in ("plain", "supplied"):
            (folder / name).mkdir(parents=True)
            write_inputs(folder / name)

    def words(self, name: str, work: Path, *, supplied: bool = False) -> tuple[str, ...]:
        """The command line of a command."""
        inputs = self.folder / ("supplied" if supplied else "plain")
        first, other = (
            f"--dataset_path={inputs}/first.jsonl",
            f"--dataset_path={inputs}/other.jsonl",
        )
        where = f"--work_dir={work}"
        lines: dict[str, tuple[str, ...]] = {
            "run": ("run", *FLAGS, first, where),
            "shard": ("shard", *FLAGS, first, where),
            "work": ("work", str(work)),
            "merge": ("merge", str(work)),
            "merge rank 1": ("merge", str(work), "--rank=1"),
            "append": ("append", str(work), other),
            "retry-failed": ("retry-failed", str(work)),
            "requeue": ("retry-failed", str(work), "--requeue_only"),
            "overwrite": ("run", *FLAGS, first, where, "--seed=7", "--overwrite"),
            "export": ("export", str(work), "--format=trl,ms_swift_jsonl"),
            "validate": ("validate", str(work)),
            "status": ("status", str(work), "--check"),
        }
        return lines[name]

    def state(self, commands: tuple[str, ...]) -> Path:
        """A work directory after these commands. Read only."""
        if commands not in self.made:
            folder = self.folder / f"state-{len(self.made)}"
            folder.mkdir()
            work = folder / "work"
            late = self.folder / "supplied/late.png"
            if "supply" in commands:
                late.unlink(missing_ok=True)
            for name in commands:
                if name == "supply":
                    shutil.copy(self.folder / "plain/there.png", late)
                    continue
                ended = run(work, self.words(name, work, supplied="supply" in commands), folder)
                assert ended.status in (0, 2) and not ended.has_traceback, ended.output
            self.made[commands] = work
        return self.made[commands]

    def copy(self, commands: tuple[str, ...]) -> tuple[Path, Path]:
        """A fresh folder for a trial, and in it a copy of the state after these commands."""
        self.num_trials += 1
        folder = self.folder / f"trial-{self.num_trials}"
        folder.mkdir()
        if commands:
            shutil.copytree(self.state(commands), folder / "work", symlinks=True)
        return folder, folder / "work"

    def outcome(self, commands: tuple[str, ...]) -> Outcome:
        """How the last of these commands ends undisturbed, and what is there then."""
        if commands not in self.outcomes:
            *before, last = commands
            folder, work = self.copy(tuple(before))
            ended = run(work, self.words(last, work, supplied="supply" in before), folder)
            assert ended.status in (0, 2) and not ended.has_traceback, ended.output
            found = Outcome(ended, facts(work), facts_in_any_order(work))
            assert not [name for name in found.facts if "cannot be read" in name], found.facts
            self.outcomes[commands] = found
            shutil.rmtree(folder)
        return self.outcomes[commands]


def write_inputs(folder: Path) -> None:
    """Two inputs; the first has a row that cannot be read, and one whose picture is not there."""
    first = write_questions(folder / "first.jsonl", FIRST)
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    late = {"question_id": "late", "question": "is it late", "image": "late.png"}
    lines = [json.dumps(row) for row in rows[:5]] + ["{broken", json.dumps(late)]
    first.write_text("\n".join([*lines, *(json.dumps(row) for row in rows[5:])]) + "\n")
    write_questions(folder / "other.jsonl", OTHER, first_id=100)
    from PIL import Image

    Image.new("RGB", (5, 5), "blue").save(folder / "there.png")


def facts(work: Path) -> Facts:
    """What a work directory holds, whatever happened on the way there."""
    found: Facts = {}
    for part in (shard_facts, result_facts, dataset_facts):
        try:
            found |= dict(part(work))
        except (StreamEngineError, OSError, ValueError) as error:
            found[f"{part.__name__} cannot be read"] = str(error)
    return found


def shard_facts(work: Path) -> Iterator[tuple[str, object]]:
    run_dir = RunDir(work)
    manifest = Manifest.load(run_dir)
    for info in manifest.shards:
        yield f"line of shard {info.index}", msgspec.to_builtins(info)
        yield f"tar of shard {info.index}", files.read_bytes(run_dir.shard(info.index))
    for source, info in manifest.inputs.items():
        rejects = quarantined(run_dir, info.quarantine)
        yield f"rejects of {source}", sorted((f.row or 0, f.reason, f.idx) for f in rejects)
        # What an interrupted reading had added is known to the next one, or added once more.
        yield f"counts of {source}", (info.read, info.added + info.known, info.rejected)


def quarantined(run_dir: RunDir, name: str) -> list[Failure]:
    try:
        return list(read_quarantine(run_dir.quarantine(name))) if name else []
    except StreamEngineError:
        return []


def result_facts(work: Path) -> Iterator[tuple[str, object]]:
    run_dir = RunDir(work)
    for stage in STAGES:
        for entry in files.list_files(run_dir.results_dir(stage)):
            header = read_header(entry.path)
            records = sorted(read_results(entry.path, RECORD_TYPES[stage]), key=lambda r: r.key)
            name = f"{stage} of {entry.path.stem}"
            yield name, [msgspec.to_builtins(record) for record in records]
            aside = quarantined(run_dir, header.quarantine)
            yield f"set aside: {name}", sorted((f.key, f.reason) for f in aside)
            yield f"counts: {name}", (header.num_samples, header.num_results, header.fingerprint)


def dataset_facts(work: Path) -> Iterator[tuple[str, object]]:
    """Every file of every dataset. Cards tell more of the inputs' counts, which may differ."""
    for path in sorted(work.glob("dataset*/**/*")):
        if path.is_file() and path.stat().st_size and not path.name.startswith("."):
            name = str(path.relative_to(work))
            if path.name == "stats.json":
                stats = msgspec.json.decode(path.read_bytes())
                yield name, {part: stats[part] for part in ("pairs", "splits", "parts")}
            elif path.name == "README.md":
                yield name, re.findall(rb"path: .*", path.read_bytes())
            else:
                yield name, path.read_bytes()


def facts_in_any_order(work: Path) -> Facts:
    """What must be there however shards are cut: two commands that read came in another order."""
    run_dir = RunDir(work)
    keys = [key for info in Manifest.load(run_dir).shards for key in info.keys]
    found: Facts = {"samples": sorted(keys)}
    for name, value in result_facts(work):
        if not name.startswith("counts"):
            kind = name.rpartition(" of ")[0]
            lists = cast(list[object], found.setdefault(kind, []))
            lists.extend(cast(list[object], value))
    rows = []
    for path in (work / "dataset").glob("train-0*"):
        rows += pyarrow.parquet.read_table(path).to_pylist()
    found["rows"] = rows
    return {name: sorted(map(repr, cast(list[object], value))) for name, value in found.items()}


def differences(found: Facts, expected: Facts) -> list[str]:
    """The names of what differs: `-` is lacking, `+` is too many, `~` is another."""
    lines = [f"-{name}" for name in expected if name not in found]
    lines += [f"+{name}" for name in found if name not in expected]
    return lines + [f"~{n}" for n in expected if n in found and found[n] != expected[n]]
