"""The commands that bring a run's pairs and answers elsewhere: `export`, `rank`, `push`."""

from __future__ import annotations

import argparse
from typing import Any

from stream_engine import api
from stream_engine.cli import notes
from stream_engine.cli.command import WORK_DIR, Command, work_dir_given
from stream_engine.cli.flags import convert_flag
from stream_engine.errors import ConfigError
from stream_engine.outputs.formats import EXPORTS, RANKINGS
from stream_engine.store.base import Location
from stream_engine.store.files import location


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _written_arguments(parser, list(EXPORTS))


def _rank_arguments(parser: argparse.ArgumentParser) -> None:
    _written_arguments(parser, list(RANKINGS))
    parser.add_argument(
        "--best",
        metavar="N",
        help="the best answers of each question, this many, as trl_sft; default: the run's setting",
    )


def _written_arguments(parser: argparse.ArgumentParser, formats: list[str]) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    parser.add_argument("--work_dir", "--output_dir", metavar="TEXT", help=WORK_DIR)
    parser.add_argument(
        "--format", action="append", metavar="A,B,...", help=f"any of {', '.join(formats)}"
    )
    parser.add_argument(
        "--max_part_bytes", metavar="N", help="of a parquet file; default: the run's setting"
    )
    parser.add_argument(
        "--test_fraction",
        metavar="X",
        help="share of the questions for a split `test`; default: the run's setting",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to, a folder or URL; default: in the work_dir"
    )
    parser.add_argument(
        "--round", metavar="N", help="of this round alone, by default into rounds/N/"
    )


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", help=WORK_DIR)
    parser.add_argument("repository", metavar="USER/NAME", help="a dataset repository of the hub")
    parser.add_argument(
        "--format", metavar="NAME", help="which format, written now where it is not; default: first"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.set_defaults(work_dir=None)


def export(args: argparse.Namespace) -> int:
    formats = formats_of(args)
    if not formats:
        raise ConfigError(f"export needs --format; choose from {', '.join(EXPORTS)}")
    for name in formats:
        done = api.export(work_dir_given(args), name, folder=folder_of(args), **output_of(args))
        print(f"{name}: {done.written} pairs in {done.folder}")
    return 0


def rank(args: argparse.Namespace) -> int:
    output = output_of(args)
    formats = formats_of(args) or (("trl_sft",) if args.best is not None else ("ranked",))
    if args.best is not None:
        if "trl_sft" not in formats:
            raise ConfigError(f"--best is of the format trl_sft, not of {','.join(formats)}")
        output["best"] = convert_flag("best", args.best, int)
    for name in formats:
        done = api.rank(work_dir_given(args), name, folder=folder_of(args), **output)
        dropped = ", ".join(f"{count} {why}" for why, count in done.dropped.items())
        left_out = f" ({sum(done.dropped.values())} answers left out: {dropped})" if dropped else ""
        print(f"{name}: {done.written} {RANKINGS[name].holds} in {done.folder}{left_out}")
    return 0


def formats_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The formats that a command line names."""
    formats = convert_flag("format", args.format or [], tuple[str, ...])
    if args.out and len(formats) > 1:
        raise ConfigError(f"--out takes one format, not {','.join(formats)}")
    return formats


def folder_of(args: argparse.Namespace) -> Location | None:
    """The folder that a command line names, to write to."""
    return location(args.out, setting="--out") if args.out else None


def output_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the output that a command line gives, and of which round it is."""
    output: dict[str, Any] = {}
    if args.round is not None:
        output["number"] = convert_flag("round", args.round, int)
    if args.max_part_bytes is not None:
        output["max_part_bytes"] = convert_flag("max_part_bytes", args.max_part_bytes, int)
    if args.test_fraction is not None:
        output["test_fraction"] = convert_flag("test_fraction", args.test_fraction, float)
    return output


def push(args: argparse.Namespace) -> int:
    print(api.push(work_dir_given(args), args.repository, format=args.format, private=args.private))
    return 0


COMMANDS = {
    "export": Command(export, _export_arguments, notes=notes.PUBLISHED),
    "rank": Command(rank, _rank_arguments, notes=notes.RANKED),
    "push": Command(push, _push_arguments, notes=notes.PUSHED),
}
