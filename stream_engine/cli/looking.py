"""The commands that look at a run and change nothing: `status`, `inspect`."""

from __future__ import annotations

import argparse
import shlex

import msgspec

from stream_engine.cli import notes
from stream_engine.cli.command import WORK_DIR, Command, work_dir_given
from stream_engine.run_dir import damage
from stream_engine.run_dir.inspect import inspect as inspect_lines
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.status import RoundStatus, Status, collect, no_pairs, problems
from stream_engine.run_dir.timings import timing_of
from stream_engine.text import printable


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    parser.add_argument("--work_dir", "--output_dir", metavar="TEXT", help=WORK_DIR)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit 2 when shards or records failed or no pair was written, 1 when work is left or "
        "a dataset is to be written (again)",
    )
    parser.add_argument(
        "--timing",
        action="store_true",
        help="also seconds a question of each stage, and CPU milliseconds beside the models",
    )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="SHARD|KEY", help="a shard's number, a key or your id")
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    parser.add_argument("--work_dir", "--output_dir", metavar="TEXT", help=WORK_DIR)


def status(args: argparse.Namespace) -> int:
    state = open_state(args)
    found = collect(state)
    timing = timing_of(state) if args.timing else None
    left, beside = datasets_to_merge(state) if args.check and found.is_finished else ([], [])
    if args.json:
        told = msgspec.to_builtins(found)
        told |= {"timing": msgspec.to_builtins(timing)} if timing else {}
        told |= {"datasets_left": left, "left_behind": beside} if args.check else {}
        print(msgspec.json.encode(told).decode())
    else:
        print("\n".join([*status_lines(found), *(timing.lines() if timing else [])]))
        for line in [f"  {problem}" for problem in problems(state)] + left + beside:
            print(printable(line))
    if not args.check:
        return 0
    if left or not found.is_finished:
        return 1
    return 2 if found.has_problems or no_pairs(state.run_dir) else 0


def datasets_to_merge(state: RunState) -> tuple[list[str], list[str]]:
    """A line for each dataset that is lost, damaged or not written yet, with what writes it; and
    for each beside which files of another publication lie."""
    from stream_engine.pairs.merge_step import datasets_left

    again = f"`stream-engine merge {shlex.quote(str(state.run_dir.root))}` writes it"
    to_write, beside = datasets_left(state)
    return (
        [f"dataset: {line}; {again}" for line in to_write],
        [f"dataset: {line}" for line in beside],
    )


def status_lines(status: Status) -> list[str]:
    """A status for people."""
    samples, shards, pairs = status.samples, status.shards, status.pairs
    lines = [
        f"samples: {samples.total} = {samples.done} done + {samples.quarantined} quarantined "
        f"+ {samples.pending} pending",
        f"shards:  {shards.total} = {shards.done} done + {shards.failed} failed "
        f"+ {shards.running} running + {shards.pending} pending",
    ]
    if status.pictures:
        by_number = ", ".join(f"{count} with {k}" for k, count in status.pictures.items())
        lines.append(f"pictures: {by_number}")
    most_first = sorted(pairs.dropped.items(), key=lambda item: (-item[1], item[0]))
    dropped = ", ".join(f"{count} {why}" for why, count in most_first)
    total = sum(pairs.dropped.values())
    lines.append(
        f"pairs:   {pairs.candidates} candidates = {pairs.written} written + {total} dropped"
        + (f" ({dropped})" if dropped else "")
    )
    if pairs.given:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in pairs.given.items())
        lines.append(f"given:   {sum(pairs.given.values())} pairs of the input: {verdicts}")
    lines += [round_line(one) for one in status.rounds]
    lines += [f"server:  {used.line(role)}" for role, used in status.servers.items()]
    for one in status.waiting:
        lines.append(f"waiting: shard {one.shard} for {one.retry_in_s:.0f} s more: {one.error}")
    for worker in status.workers:
        lines.append(f"worker:  {worker.worker} holds {worker.holds} for {worker.since_s:.0f} s")
    return lines


def round_line(one: RoundStatus) -> str:
    """A round for people."""
    of = one.samples
    left = f" + {of.quarantined} quarantined + {of.pending} pending" * bool(of.total - of.done)
    failed = f", {one.failed_shards} shards failed" * bool(one.failed_shards)
    model = f"; {one.instruct_model}" * bool(one.instruct_model)
    rejected = f", {one.rejected} records rejected" * bool(one.rejected)
    counts = f"{of.total} samples = {of.done} done{left}{failed}{rejected}"
    return f"round {one.round}: {counts}; {one.pairs} pairs{model}"


def inspect(args: argparse.Namespace) -> int:
    for text in inspect_lines(open_state(args), args.target):
        for line in text.split("\n"):
            print(printable(line))
    return 0


def open_state(args: argparse.Namespace) -> RunState:
    """The state of the run that a command line names."""
    return damage.open_state(work_dir_given(args))


COMMANDS = {
    "status": Command(status, _status_arguments, notes=notes.WORK_DIR),
    "inspect": Command(inspect, _inspect_arguments),
}
