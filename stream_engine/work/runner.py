"""run(): what `stream-engine run` does, as a function. Every launcher's every process calls it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Literal, TypeVar

import msgspec

from stream_engine.config import STAGES, RunConfig
from stream_engine.errors import ConfigError, MissingStageError
from stream_engine.inputs.ingest import note_lines
from stream_engine.inputs.unread import unread_lines
from stream_engine.models.hub import with_checkpoints
from stream_engine.outputs.formats import FORMATS, RANKINGS, check_formats
from stream_engine.outputs.published import RECORD
from stream_engine.pairs.merge_step import Outcome, merge_when_due
from stream_engine.pipelines import pipeline_class
from stream_engine.pipelines.base import Pipeline
from stream_engine.ranks import Rank
from stream_engine.run_dir.damage import whole_manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.refusals import refuse_foreign, refuse_no_input, refuse_unwritable
from stream_engine.run_dir.rounds import config_of_round
from stream_engine.run_dir.run_json import (
    RunFile,
    open_run,
    read_run_file,
)
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.status import Status, collect, no_pairs, problems, rejects_files
from stream_engine.store import files
from stream_engine.text import printable
from stream_engine.work.follower import follow
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.other_python import find_python, run_rewards_under
from stream_engine.work.progress import ProgressView, set_up_logging
from stream_engine.work.rounds import pipeline_of_round, rounds_left
from stream_engine.work.signals import exit_on_signals
from stream_engine.work.stage_inputs import check_inputs, kept_models, stage_inputs
from stream_engine.work.team import Team
from stream_engine.work.tracking import Tracker
from stream_engine.work.worker import Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")
Step = Literal["shard", "work", "merge"]
ALL_STEPS: tuple[Step, ...] = ("shard", "work", "merge")


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended. The same for every worker of the run, but for the first three fields."""

    samples_added_here: int
    """New samples that this process read from the input."""
    shards_done_here: int
    """Shards that this process finished; 0 when there was nothing to do."""
    merged_here: bool
    work_dir: str
    dataset: str | None
    """Folder of the finished dataset; None when the merge was not part of the run."""
    status: Status
    problems: list[str]
    """Every failed shard and quarantined record, one line each; long lists are cut."""
    rejects_files: list[str]
    """Where the records are listed that were rejected when they were read."""
    rejected: list[str]
    """The reasons for which records were rejected when they were read."""
    no_pairs: str | None
    """Why the dataset holds no pair though samples were scored."""
    notes: list[str]
    """What did not fail, but may not be meant: columns, files and members that nothing read, and
    what was done to rows on the way."""

    @property
    def exit_status(self) -> int:
        """0 done, 2 finished but shards or records failed, or no pair came of it."""
        return 2 if self.problems or self.no_pairs else 0


def run(
    config: RunConfig,
    *,
    steps: Sequence[Step] = ALL_STEPS,
    show_progress: bool = True,
    number: int | None = None,
) -> RunReport:
    """Build the dataset, or what is left to build of it, and return how it went.

    Resumes what an earlier call with the same settings began; a finished run is a no-op. `steps`
    leaves parts out: "shard" reads the input, "work" runs the models, "merge" writes the dataset.
    `number` is that of the round these settings are of, where workers may be at different ones.

    Raises:
        RoundOverError: when the run has gone on from that round.
        ConfigError: for wrong settings, or settings that contradict results on hand.
        CheckpointError: when a model cannot be loaded.
        MissingStageError: when `run_stage` builds upon a stage that was not run.
    """
    pipeline = checked_pipeline(config, needs_models=runs_models(config, steps))
    with view_of(config, show_progress=show_progress) as view:
        return run_steps(config, pipeline, steps, view, number)


def runs_models(config: RunConfig, steps: Sequence[Step]) -> bool:
    """Whether these steps of a run need its models."""
    return "work" in steps and config.run_stage != 2


def checked_pipeline(config: RunConfig, *, needs_models: bool = True) -> Pipeline:
    """The pipeline of a run, whose work directory can be written to.

    Raises:
        ConfigError: for wrong settings, or a folder that holds something else.
    """
    run_dir = RunDir(config.work_dir)
    refuse_foreign(run_dir)
    refuse_unwritable(run_dir)
    if needs_models or kept_models(config) is None:
        config = with_checkpoints(config)
    return pipeline_class(config.pipeline_name)(config)


@contextmanager
def view_of(config: RunConfig, *, show_progress: bool) -> Iterator[ProgressView]:
    """What shows this run's progress, on the first rank alone, and tells its tracker."""
    is_first = Rank.from_environment().rank == 0
    tracker = Tracker(config, is_first=is_first)
    try:
        yield ProgressView(
            silent=not show_progress or not is_first,
            listener=tracker.progress if tracker.backend else None,
        )
    finally:
        tracker.finish()


def run_steps(
    config: RunConfig,
    pipeline: Pipeline,
    steps: Sequence[Step],
    view: ProgressView,
    number: int | None = None,
) -> RunReport:
    """`run`, shown by a view that several calls may share."""
    size = config.tensor_parallel if runs_models(config, steps) else 1
    rank = Rank.from_environment(tensor_parallel=size)
    run_dir = RunDir(config.work_dir)
    work = functools.partial(run_as_worker, run_dir, config, pipeline, steps, rank, view, number)
    report = with_team(run_dir, config, pipeline, rank, work)
    if report is None:
        report = report_of(state_of(config), config)
    return report


def state_of(config: RunConfig) -> RunState:
    """How a run stands that was begun."""
    run_dir = RunDir(config.work_dir)
    fingerprints = read_run_file(run_dir).fingerprints
    return RunState(run_dir, fingerprints, max_shard_retries=config.max_shard_retries).refresh()


def run_as_worker(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    steps: Sequence[Step],
    rank: Rank,
    view: ProgressView,
    number: int | None,
    team: Team | None,
) -> RunReport:
    """`run` as one worker: a rank by itself, or the one that leads a team."""
    elsewhere = find_python(config.reward_model_python_path) if "work" in steps else None
    works = runs_models(config, steps)
    run_file = begin(run_dir, config, pipeline, rank, number, needs_models=works)
    fingerprints = run_file.fingerprints
    state = RunState(run_dir, fingerprints, max_shard_retries=config.max_shard_retries).refresh()
    here = config
    if elsewhere and config.run_stage is None:
        here = dataclasses.replace(config, run_stage=0)
    workers = functools.partial(Worker, run_dir, rank=rank, view=view, team=team)
    worker = workers(here, pipeline, fingerprints)
    do_shards = works and not (elsewhere and config.run_stage == 1)
    num_done = 0
    outcome: Outcome | None = None
    # In another round this process loads other models, into the memory of these.
    with exit_on_signals(run_dir, rank.worker_id), closing(worker.engines):
        if config.run_stage in (1, 2):
            require_rollouts(state, config)
        while outcome is None or (works and outcome == "unsettled"):
            if not {"shard", "work"}.isdisjoint(steps):
                with view:
                    if do_shards:
                        num_done += work_at_earlier(run_file, here, worker.state, workers)
                    num_done += worker.work(read_input="shard" in steps, do_shards=do_shards)
                has_rewards = config.run_stage in (None, 1)
                if elsewhere and has_rewards and state.refresh().unsettled(("rewards",)):
                    run_rewards_under(elsewhere, config.work_dir)
            if "shard" in steps and config.run_stage in (None, 0):
                check_questions(worker.state, config)
            outcome = "current"
            if "merge" in steps and config.run_stage in (None, 2):
                # Asked of the worker's own view, so that the two agree on what is left to do.
                outcome = merge_when_due(
                    worker.state, config, pipeline, rank.worker_id, works=works
                )
    merged = outcome == "merged"
    num_added = worker.inputs.num_added
    return report_of(state.refresh(), config, num_added=num_added, num_done=num_done, merged=merged)


def check_questions(state: RunState, config: RunConfig) -> None:
    """Say so when the inputs had fewer questions than the round at hand was to take.

    Raises:
        ConfigError: when they had none for a round that was begun.
    """
    number, first = state.fingerprints.at_hand, state.fingerprints.first_shard
    taken = state.manifest.num_samples_from(first)
    if number > 1 and not taken:
        raise ConfigError(
            f"round {number} has no questions: the inputs hold none that the run has not got. The "
            "same command with more of them (--dataset_path) goes on"
        )
    if taken < (config.questions or 0):
        text = "round %d has %d of %d questions: the inputs hold no more"
        logger.warning(text, number, taken, config.questions)


def work_at_earlier(
    run_file: RunFile, config: RunConfig, state: RunState, workers: Callable[..., Worker]
) -> int:
    """Do what is left of rounds that are over; returns how many shards were done here.

    Raises:
        ConfigError: when a model of such a round is no longer what it was, or this rank has a team.
    """
    num_done = 0
    stages = STAGES if config.run_stage is None else STAGES[config.run_stage : config.run_stage + 1]
    for number in rounds_left(state.refresh(), stages):
        if config.tensor_parallel > 1:
            raise ConfigError(
                f"shards of round {number} are left; ranks that hold a model together do these by "
                "`stream-engine work WORK_DIR --shard N`"
            )
        theirs = config_of_round(run_file.rounds, number, config)
        pipeline = pipeline_of_round(run_file, number, config)
        worker = workers(theirs, pipeline, run_file.fingerprints, number=number)
        num_done += worker.work(read_input=False)
        worker.engines.close()
    return num_done


def report_of(
    state: RunState,
    config: RunConfig,
    *,
    num_added: int = 0,
    num_done: int = 0,
    merged: bool = False,
) -> RunReport:
    """How the run stands now, and what this process did for it."""
    folder = state.run_dir.dataset_dir
    has_dataset = config.run_stage in (None, 2) and files.exists(state.run_dir.stats_json)
    return RunReport(
        samples_added_here=num_added,
        shards_done_here=num_done,
        merged_here=merged,
        work_dir=config.work_dir,
        dataset=str(folder) if has_dataset else None,
        status=collect(state),
        problems=problems(state),
        rejects_files=[str(path) for path in rejects_files(state)],
        rejected=sorted({r for info in state.manifest.inputs.values() for r in info.rejected}),
        no_pairs=no_pairs(state.run_dir) if has_dataset else None,
        notes=[
            f"{printable(source)}: {line}"
            for source, info in state.manifest.inputs.items()
            for line in (
                *unread_lines(info.unread, info.left_out, info.examples),
                *note_lines(info.notes, info.examples),
            )
        ]
        + (older_exports(state.run_dir, config) if has_dataset else []),
    )


def older_exports(run_dir: RunDir, config: RunConfig) -> list[str]:
    """Datasets that `export` or `rank` wrote before the last merge: they lack what came since."""
    merged = files.stat(run_dir.stats_json)
    names = [name for name in FORMATS if name not in config.format]
    written = {name: files.stat(run_dir.export_dir(name) / RECORD) for name in names}
    return [
        f"{run_dir.export_dir(name)} is from before the last merge: `stream-engine "
        f"{'rank' if name in RANKINGS else 'export'} {shlex.quote(str(run_dir.root))} "
        f"--format {name}` brings it up to date"
        for name, entry in written.items()
        if entry is not None and merged is not None and entry.modified < merged.modified
    ]


def require_rollouts(state: RunState, config: RunConfig) -> None:
    """Raise MissingStageError when a stage that --run_stage builds upon is not done."""
    for number, stage in enumerate(STAGES[: config.run_stage or 0]):
        missing = state.unsettled((stage,))
        if missing or not state.shards:
            what = f"{len(missing)} of {len(state.shards)} shards" if missing else "all shards"
            raise MissingStageError(
                f"--run_stage {config.run_stage} needs the {stage} of {what}; first run "
                f"`stream-engine run --run_stage {number}` with the same settings"
            )


def begin(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    rank: Rank,
    number: int | None = None,
    *,
    needs_models: bool = True,
) -> RunFile:
    """Set up this worker's log file and open the run's settings, those of a round if one is told.

    Where no model is needed, those of the run may be elsewhere.

    Raises:
        RoundOverError: when the run has gone on from that round.
    """
    check_formats(config)
    inputs = stage_inputs(pipeline, None if needs_models else kept_models(config))
    refuse_no_input(run_dir, config)
    check_inputs(config, known=whole_manifest(run_dir).inputs)
    set_up_logging(run_dir.log(rank.log_name), worker=rank.worker_id, echo=rank.rank == 0)
    run_file, notes = open_run(run_dir, config, inputs, number)
    for note in notes:
        logger.info("%s", note)
    return run_file


def retry_shard(config: RunConfig, index: int) -> None:
    """Do one shard in the foreground, whatever became of it before; its error rises as it is.

    Raises:
        ConfigError: when there is no such shard, or another worker holds it.
    """
    rank = Rank.from_environment(tensor_parallel=config.tensor_parallel)
    pipeline = pipeline_class(config.pipeline_name)(with_checkpoints(config))
    run_dir = RunDir(config.work_dir)
    run_file = read_run_file(run_dir)
    number = run_file.fingerprints.round_of(index)
    theirs = config_of_round(run_file.rounds, number, config)
    at_hand = pipeline
    if number <= len(run_file.rounds):
        pipeline = pipeline_of_round(run_file, number, config)

    def work(team: Team | None) -> None:
        fingerprints = begin(run_dir, config, at_hand, rank).fingerprints
        with exit_on_signals(run_dir, rank.worker_id), ProgressView() as view:
            workers = functools.partial(Worker, run_dir, rank=rank, view=view, team=team)
            workers(theirs, pipeline, fingerprints, number=number).do_in_foreground(index)

    with_team(run_dir, theirs, pipeline, rank, work)


def with_team(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    rank: Rank,
    lead: Callable[[Team | None], T],
) -> T | None:
    """What `lead` returns, as a worker by itself or beside a team; None on a rank that follows."""
    if rank.tensor_parallel == 1:
        return lead(None)
    with Team.join(rank, config.device) as team:
        if team.leads:
            return lead(team)
        set_up_logging(run_dir.log(rank.log_name), worker=rank.worker_id, echo=False)
        with closing(LoadedEngines(run_dir, pipeline, rank)) as engines:
            follow(team, pipeline, engines)
    return None
