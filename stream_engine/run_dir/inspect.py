"""inspect: what happened to one shard or one sample, and the command that does it again."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator

from stream_engine.config import STAGES
from stream_engine.errors import ConfigError
from stream_engine.records import SampleRewards, SampleRollouts, ShardInfo
from stream_engine.run_dir.rankings import ranking_line
from stream_engine.run_dir.results import quarantined_by, read_results
from stream_engine.run_dir.rounds import answering_model
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.shards import read_shard
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.status import describe_failure, quarantined
from stream_engine.text import duration


def inspect(state: RunState, target: str) -> Iterator[str]:
    """Lines about a shard (by its number) or a sample (by its key, or the user's own id).

    Raises:
        ConfigError: when the run has no such shard or sample.
    """
    if target.isdecimal() and int(target) < len(state.shards):
        yield from inspect_shard(state, state.manifest.shards[int(target)])
        for _, key in samples_of(state, target):
            command = ["stream-engine", "inspect", key, str(state.run_dir.root)]
            yield f"also      the id of a sample: {shlex.join(command)}"
        return
    is_found = False
    for info, key in samples_of(state, target):
        is_found = True
        yield from inspect_sample(state, info, key)
    if is_found:
        return
    rejected = [f for f in quarantined(state) if target in (f.key, f.idx)]
    if not rejected:
        raise ConfigError(
            f"{target!r} is no shard (there are {len(state.shards)}) and no sample's key or id"
        )
    yield from (f"rejected  {describe_failure(failure)}" for failure in rejected)


def samples_of(state: RunState, target: str) -> Iterator[tuple[ShardInfo, str]]:
    """The samples of that key or id, of which there may be several, by shard and key."""
    for info in state.manifest.shards:
        for key, idx in zip(info.keys, info.ids):
            if target in (key, idx):
                yield info, key


def inspect_shard(state: RunState, info: ShardInfo) -> Iterator[str]:
    """Where a shard is, what each stage made of it, why it failed, and how to do it again."""
    shard = state.shards[info.index]
    yield f"shard {info.index}   {state.run_dir.shard(info.index)}"
    yield f"  {info.num_samples} samples, {info.num_bytes} bytes, sha256 {info.sha256}"
    yield from round_lines(state, info.index)
    for stage in STAGES:
        header = state.header(stage, shard)
        if header is None:
            yield f"{stage:9} not done"
            continue
        by = header.created_by
        what = "done" if state.is_complete(stage, shard) else "done in part"
        yield (
            f"{stage:9} {what}: {header.num_results} results, {header.num_quarantined} quarantined,"
            f" by {by.get('worker')} in {by.get('seconds')} s, {ago(by.get('finished', 0.0))}"
        )
        for record in quarantined_by(state.run_dir, header):
            yield f"  {describe_failure(record)}"
    if all(state.is_complete(stage, shard) for stage in STAGES):
        yield f"ranking   {ranking_line(state.run_dir, info.index)}"
    lease = state.holders().get(info.index)
    if lease is not None:
        yield f"running   {lease.worker_id} since {duration(lease.held_s)}"
    failure = state.failure(shard)
    if failure is not None:
        final = "given up" if state.is_failed(shard) else "to be tried again"
        deaths = f", {failure.num_deaths} workers ended at it" if failure.num_deaths else ""
        yield f"failed    at {failure.stage}, {failure.attempts} attempts{deaths}, {final}"
        yield f"  {failure.error}"
        yield f"  last by {failure.worker}, {duration(max(0.0, state.now() - failure.time))} ago"
        yield from (f"  | {line}" for line in failure.traceback.rstrip().splitlines())
    yield f"again     {rerun_command(state, info.index)}"


def inspect_sample(state: RunState, info: ShardInfo, key: str) -> Iterator[str]:
    """A sample's question, its answers best first, and what set it aside."""
    shard = state.shards[info.index]
    sample = next(
        s for s in read_shard(state.run_dir.shard(info.index), info, verify=False) if s.key == key
    )
    yield f"sample {key}   idx {sample.idx}, shard {info.index}"
    yield from round_lines(state, info.index)
    yield f"question  {sample.question}"
    for i, image in enumerate(sample.images):
        yield f"image {i}   {image.path or '(no path)'}, {len(image.data)} bytes"
    rollouts = rewards = None
    if state.header("rollouts", shard):
        path = state.run_dir.result("rollouts", info.index)
        rollouts = next((r for r in read_results(path, SampleRollouts) if r.key == key), None)
    if state.header("rewards", shard):
        path = state.run_dir.result("rewards", info.index)
        rewards = next((r for r in read_results(path, SampleRewards) if r.key == key), None)
    if rollouts is not None:
        scores = {s.index: s.score for s in rewards.scores} if rewards else {}
        for answer in sorted(rollouts.answers, key=lambda a: -scores.get(a.index, 0.0)):
            score = f"{scores[answer.index]:+.4f}" if answer.index in scores else "unscored"
            yield f"answer {answer.index:2} {score:>9}  {answer.text}"
    for failure in quarantined(state):
        if failure.key == key:
            yield f"set aside {describe_failure(failure)}"
    yield f"again     {rerun_command(state, info.index)}"


def round_lines(state: RunState, index: int) -> Iterator[str]:
    """Which round a shard is of, and who answers in it, in a run of several."""
    if state.fingerprints.at_hand > 1:
        number = state.fingerprints.round_of(index)
        settings = read_run_file(state.run_dir).every_round[number - 1].settings
        yield f"round     {number}, answers of {answering_model(settings)}"


def rerun_command(state: RunState, index: int) -> str:
    """The command that does a shard in the foreground, with the settings of the run."""
    return shlex.join(["stream-engine", "work", str(state.run_dir.root), "--shard", str(index)])


def ago(when: float) -> str:
    return f"{duration(time.time() - when)} ago"
