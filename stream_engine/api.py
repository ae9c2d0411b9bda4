"""The package from Python: what notebooks and other programs call.

    from stream_engine import api

    config = api.RunConfig(
        work_dir="work",
        dataset_path=["questions.parquet"],
        instruct_model_path="/models/instruct",
        reward_model_path="/models/reward",
    )
    api.run(config)
    api.status("work").pairs.written
    for pair in api.pairs("work"):
        pair.question, pair.images, pair.chosen, pair.rejected, pair.margin

Each function is a command of the same name (`next_round` is `round`). Wrong settings raise
ConfigError, as everything that a user can mend raises a StreamEngineError. Importing this module
imports no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError
from stream_engine.outputs.formats import RANKINGS
from stream_engine.outputs.publication import refuse_other_dataset
from stream_engine.outputs.reading import read_pairs
from stream_engine.outputs.validate import holds_dataset, is_dataset, is_run
from stream_engine.outputs.validate import validate as dataset_problems
from stream_engine.pairs.merge_report import FormatReport
from stream_engine.pairs.merge_step import wait_for_lease
from stream_engine.pairs.merger import export as export_format
from stream_engine.pairs.ranked import write_ranking
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.records import DatasetPair
from stream_engine.report import DEFAULT_ROWS
from stream_engine.run_dir.damage import around_damage, open_state
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import merged_sources, read_run_file
from stream_engine.run_dir.status import Status, collect
from stream_engine.run_dir.verify import damaged_parts
from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.store.files import location
from stream_engine.text import DENIED, describe
from stream_engine.work.rounds import begin_round
from stream_engine.work.runner import RunReport, run

WrittenT = TypeVar("WrittenT")

__all__ = [
    "DatasetPair",
    "RunConfig",
    "RunReport",
    "append",
    "export",
    "next_round",
    "pairs",
    "push",
    "rank",
    "report",
    "run",
    "status",
    "validate",
]


def append(
    work_dir: str | Location,
    dataset_path: Sequence[str],
    *,
    max_samples: int | None = None,
    questions: int | None = None,
    show_progress: bool = True,
) -> RunReport:
    """Add datasets to a run and build what is new, with the settings that the run has.

    Raises:
        ConfigError: when there is no run, or a dataset cannot be read.
    """
    settings = read_run_file(RunDir(work_dir)).settings
    new = settings | {
        "work_dir": str(work_dir),
        "dataset_path": as_names("dataset_path", dataset_path),
        "max_samples": max_samples,  # the run's own are of what it was given with
        "questions": questions,
    }
    return run(RunConfig.create(new), show_progress=show_progress)


def next_round(
    work_dir: str | Location,
    *,
    number: int | None = None,
    dataset_path: Sequence[str] = (),
    show_progress: bool = True,
    **settings: Any,
) -> RunReport:
    """Answer the next questions of a run under other settings, another `instruct_model_path` most
    of all: `stream-engine round`. A round that has begun goes on.

    Args:
        number: of the round; default: the one at hand where that has these models, else the next.
        settings: those of RunConfig that change; the others are the run's.

    Raises:
        ConfigError: when there is no run, or its round at hand is not finished.
    """
    kept = read_run_file(RunDir(work_dir)).settings
    sources = merged_sources(kept["dataset_path"], as_names("dataset_path", dataset_path))
    of_this = {"work_dir": str(work_dir), "dataset_path": sources, "max_samples": None}
    config = RunConfig.create(kept | of_this | settings)
    begin_round(config, number)
    return run(config, show_progress=show_progress)


def status(work_dir: str | Location) -> Status:
    """Where a run stands: samples, shards and pairs, from its files alone.

    Raises:
        ConfigError: when there is no run.
    """
    return collect(open_state(work_dir))


def validate(path: str | Location) -> list[str]:
    """The problems of a run with all its parts, or of a dataset, one line each; [] is: fine.

    Raises:
        ConfigError: when the path holds neither.
    """
    if not is_dataset(path):
        raise ConfigError(f"{path} holds no run and no dataset of ours")
    damaged = damaged_parts(open_state(path)) if is_run(location(path)) else []
    return [*damaged, *dataset_problems(path)]


def export(
    work_dir: str | Location,
    format: str,
    *,
    folder: str | Location | None = None,
    number: int | None = None,
    **output: Any,
) -> FormatReport:
    """Write the pairs of a run in one more format, by default into the run directory.

    Args:
        number: the round whose pairs are wanted; default: those of all.
        output: settings of the output, as `test_fraction` or `max_part_bytes`; default: the run's.

    Raises:
        ConfigError: for an unknown format or setting, or a folder that holds something else.
    """
    write = functools.partial(export_format, number=number)
    report = written(write, work_dir, format, folder, output)
    return report.formats[format]


def rank(
    work_dir: str | Location,
    format: str = "ranked",
    *,
    folder: str | Location | None = None,
    number: int | None = None,
    **output: Any,
) -> FormatReport:
    """Write the answers of a run, scored and ranked, without pairs; `written` counts the rows.

    Args:
        format: `ranked` (every question with all its answers), `trl_kto` or `trl_sft`.
        number: the round whose answers are wanted; default: those of all.
        output: settings of the output, as `best` or `test_fraction`; default: the run's.

    Raises:
        ConfigError: for an unknown format or setting, or a folder that holds something else.
    """
    write = functools.partial(write_ranking, number=number)
    return written(write, work_dir, format, folder, output)


def written(
    write: Callable[..., WrittenT],
    work_dir: str | Location,
    format: str,
    folder: str | Location | None,
    output: dict[str, Any],
) -> WrittenT:
    """What `write` makes of a run that it is handed with its settings, under the merge lease.

    A run that only may be read has none, and can be written elsewhere.
    """
    state = open_state(work_dir)
    run_file = read_run_file(state.run_dir)
    config = RunConfig.create(run_file.config().to_dict() | output)
    pipeline = pipeline_class(config.pipeline_name)(config)
    target = location(folder, setting="folder") if folder else None
    if target is not None:
        refuse_other_dataset(target, format, run=state.run_dir.root)
    worker = Rank.from_environment().worker_id

    def write_it() -> WrittenT:
        return write(
            state.run_dir,
            config,
            pipeline,
            run_file.fingerprints,
            format=format,
            folder=target,
            allow_partial=any(state.is_failed(shard) for shard in state.shards),
        )

    with ExitStack() as stack:
        try:
            stack.enter_context(wait_for_lease(state, config, worker))
        except OSError as error:
            if error.errno not in DENIED:
                raise
            if target is None:
                what = f"{describe(error)}; name a folder to write to (--out)"
                raise ConfigError(what) from error
        return around_damage(state, config, worker, write_it)


def push(
    work_dir: str | Location, repo_id: str, *, format: str | None = None, private: bool = False
) -> str:
    """Bring a dataset of a run, or a dataset's folder, to the Hugging Face hub; returns its URL.

    Args:
        repo_id: `user/name`, made where there is none.
        format: written now where the run has not got it; default: the first of the run.

    Raises:
        ConfigError: when there is no dataset, or the hub refuses it.
    """
    from stream_engine.outputs.hub import push_folder

    if format is not None and is_run(location(work_dir)):
        write = rank if format in RANKINGS else export
        folder = location(write(work_dir, format).folder)
    else:
        folder = dataset_folder(work_dir)
    if not isinstance(folder, Path):
        raise ConfigError(f"{folder}: export it to a folder of a disk first, and push that")
    return push_folder(folder, repo_id, private=private)


def report(
    work_dir: str | Location, *, out: str | Location | None = None, rows: int = DEFAULT_ROWS
) -> Path:
    """Write the page of a run's counts and pairs; returns it. `rows` is of how many pairs.

    Raises:
        ConfigError: when there is no run, or `out` (by default in the run) is not on a disk; for
            negative `rows`.
    """
    from stream_engine.report.run import ReportedRun
    from stream_engine.report.site import write_report

    found = ReportedRun.open(work_dir)
    folder = location(out, setting="out") if out else None
    return Path(write_report(found, folder, num_rows=rows, seed=found.config.seed).page)


def pairs(work_dir: str | Location, format: str | None = None) -> Iterator[DatasetPair]:
    """The pairs of a run, or of a dataset's folder, with their pictures, one at a time.

    Args:
        format: which of the run's datasets; default: the first.

    Raises:
        ConfigError: when there is no dataset.
    """
    return read_pairs(dataset_folder(work_dir, format))


def dataset_folder(path: str | Location, format: str | None = None) -> Location:
    """A dataset of a run, or the path itself where it is one."""
    run_dir = RunDir(path)
    if not is_run(run_dir.root) and holds_dataset(run_dir.root):
        return run_dir.root
    formats = read_run_file(run_dir).config().format if files.exists(run_dir.run_json) else ()
    first = not format or format == next(iter(formats), None)
    return run_dir.dataset_dir if first else run_dir.export_dir(str(format))


def as_names(name: str, values: Sequence[str]) -> list[str]:
    """A list of names; a single str is refused, as it would be read letter by letter."""
    if isinstance(values, str):
        raise ConfigError(f"{name} is a list: write [{values!r}]")
    return [str(value) for value in values]
