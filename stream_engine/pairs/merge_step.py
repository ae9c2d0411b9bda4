"""The last step of a run: exactly one worker merges, when every shard is settled."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Literal

from stream_engine import __version__
from stream_engine.config import STAGES, RunConfig
from stream_engine.errors import ConfigError, LeaseLostError
from stream_engine.outputs.publication import left_behind, other_publications
from stream_engine.outputs.published import CARD, RECORD, is_ours, quick_problems
from stream_engine.pairs.merge_inputs import MergeInputs, seen_inputs
from stream_engine.pairs.merge_report import MergeReport, is_current, read_stats
from stream_engine.pairs.merger import merge
from stream_engine.pairs.rounds import configs_of_rounds, datasets_of
from stream_engine.pipelines.base import Pipeline
from stream_engine.run_dir.damage import around_damage
from stream_engine.run_dir.rounds import firsts_on_file
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.state import RunState
from stream_engine.store import files
from stream_engine.store.base import Location, Version
from stream_engine.store.leases import Lease

logger = logging.getLogger(__name__)

POLL_S = 0.2

Outcome = Literal["merged", "current", "unsettled"]
"""This worker merged; there was nothing to merge; or shards came that are still to be done."""


def merge_when_due(
    state: RunState, config: RunConfig, pipeline: Pipeline, worker: str, *, works: bool
) -> Outcome:
    """`merge_once`, and again when another process has published a dataset meanwhile."""
    while True:
        try:
            return merge_once(state, config, pipeline, worker, works=works)
        except LeaseLostError as error:
            logger.warning("%s", error)
            time.sleep(POLL_S)


def merge_once(
    state: RunState, config: RunConfig, pipeline: Pipeline, worker: str, *, works: bool
) -> Outcome:
    """Merge unless the dataset is up to date; waits while another worker is at it.

    All shards must be settled; failed ones are left out, and so are those of which a file turns
    out to be damaged. An `append` may bring new shards at any moment before this worker has the
    lease. Whoever settles those merges, so they are no error here: a worker (`works`) goes back to
    do them, and a merge alone leaves them to others.

    Raises:
        ConfigError: when the input held no sample, and no bad record says why.
        MissingStageError: without `works`, when shards were unsettled from the outset.
        ChangedError: when another process has published a dataset meanwhile.
    """
    was_settled = not state.refresh().unsettled(STAGES)
    if works and not was_settled:
        return "unsettled"
    if was_settled and not any(state.is_complete(STAGES[-1], shard) for shard in state.shards):
        if not state.shards and not state.num_rejected():
            raise ConfigError("the input holds no samples")
        return "current"
    before = datasets_on_file(state, config)
    with wait_for_lease(state, config, worker):
        if state.fingerprints.first_of_next(firsts_on_file(state.run_dir)) is not None:
            return "current"  # or no other round could have begun
        is_settled = not state.refresh().unsettled(STAGES)
        if was_settled and not is_settled:
            if not works:
                logger.warning("new shards came; whoever computes them builds the dataset")
            return "unsettled"
        if was_merged_meanwhile(state, config, before):
            return "current"
        fingerprints = state.fingerprints
        started = time.monotonic()

        def write() -> MergeReport:
            has_failed = any(state.is_failed(shard) for shard in state.shards)
            allow_partial = has_failed and is_settled
            return merge(state.run_dir, config, pipeline, fingerprints, allow_partial=allow_partial)

        report = around_damage(state, config, worker, write)
        if not report.is_new:
            return "current"
        logger.info(
            "merged in %.1f s: %d pairs of %d candidates",
            time.monotonic() - started,
            report.written,
            report.candidates,
        )
    return "merged"


def was_merged_meanwhile(state: RunState, config: RunConfig, before: dict[str, Version]) -> bool:
    """Whether every dataset was replaced since `before`, by one of what this worker has seen.

    The workers of a run all wait for the one that merges. Without this each in turn would read
    every result's header again, under the lease, to find nothing to do.
    """
    now = datasets_on_file(state, config)
    folders = state.run_dir.dataset_folders(config.format)
    if now.keys() != folders.keys() or any(before.get(name) == now[name] for name in now):
        return False
    inputs = seen_inputs(state)
    return all(
        is_current(folder, inputs, inputs.fingerprint(config, name))
        for name, folder in folders.items()
    )


def datasets_left(state: RunState) -> tuple[list[str], list[str]]:
    """A line for each dataset that a merge would write now, where nothing is left to work on; and
    one for each beside whose files those of another publication lie."""
    to_write: list[str] = []
    beside: list[str] = []
    for folder, part, config, name in datasets(state):
        if why := reason_to_write(folder, part, config, name):
            to_write.append(why)
        beside += other_publications(left_behind(folder))
    return to_write, beside


def datasets(state: RunState) -> Iterator[tuple[Location, MergeInputs, RunConfig, str]]:
    """Where each dataset of a run belongs, what a merge would make it from now, and its format."""
    inputs, run_dir = seen_inputs(state), state.run_dir
    if all(counts is None for _, _, counts in inputs.digest):
        return
    configs = configs_of_rounds(run_dir, read_run_file(run_dir).config(), inputs)
    formats = configs[len(configs)].format
    *of_rounds, of_all = datasets_of(run_dir, configs, inputs)
    for part, place in (of_all, *of_rounds):
        config = configs[part.number or len(configs)]
        for name, folder in place.dataset_folders(formats).items():
            yield folder, part, config, name


def reason_to_write(
    folder: Location, inputs: MergeInputs, config: RunConfig, name: str
) -> str | None:
    """Why a merge would write a dataset, by a quick look; None where it stands as it should."""
    stats = read_stats(folder)
    if stats is None:
        is_there = is_ours(folder)
        return f"{folder / RECORD}: is lost or damaged" if is_there else f"{folder}: is not written"
    if stats.get("format") != name:
        return f"{folder}: holds {stats.get('format')}, the settings ask for {name}"
    if stats.get("version") == __version__:  # another would write it anew, but it is whole
        is_of_these = stats["fingerprint"] == inputs.fingerprint(config, name)
    else:
        is_of_these = inputs.samples.items() <= stats["samples"].items()
    if not is_of_these and not inputs.missing:  # of shards that failed it may have what is lost now
        return f"{folder}: is not of the results and settings that are there now"
    return next(quick_problems(folder, stats), None)


def datasets_on_file(state: RunState, config: RunConfig) -> dict[str, Version]:
    """By format, the version of each dataset's card, which a merge puts there last."""
    folders = state.run_dir.dataset_folders(config.format)
    found = {name: files.version_of(folder / CARD) for name, folder in folders.items()}
    return {name: version for name, version in found.items() if version is not None}


def wait_for_lease(state: RunState, config: RunConfig, worker: str) -> Lease:
    """The merge lease; whoever has to wait for it finds the work done."""
    folder, timeout_s = state.run_dir.leases_dir, config.lease_timeout_s
    return Lease.wait_for(folder, "merge", worker_id=worker, timeout_s=timeout_s)
