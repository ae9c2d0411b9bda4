"""The commands that bring a run's pairs elsewhere: `export`, `push`."""

from __future__ import annotations

import argparse
from typing import Any

from stream_engine import api
from stream_engine.cli import notes
from stream_engine.cli.command import WORK_DIR, Command, work_dir_of
from stream_engine.cli.flags import convert_flag
from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError
from stream_engine.outputs.formats import EXPORTS
from stream_engine.store.files import location


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    parser.add_argument("--work_dir", "--output_dir", metavar="TEXT", help=WORK_DIR)
    parser.add_argument(
        "--format", action="append", metavar="A,B,...", help=f"any of {', '.join(EXPORTS)}"
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


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", help=WORK_DIR)
    parser.add_argument("repository", metavar="USER/NAME", help="a dataset repository of the hub")
    parser.add_argument(
        "--format", metavar="NAME", help="which format, written now where it is not; default: first"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.set_defaults(work_dir=None)


def export(args: argparse.Namespace) -> int:
    formats = convert_flag("format", args.format or [], tuple[str, ...])
    if not formats:
        raise ConfigError(f"export needs --format; choose from {', '.join(EXPORTS)}")
    if args.out and len(formats) > 1:
        raise ConfigError(f"--out takes one format, not {','.join(formats)}")
    folder = location(args.out, setting="--out") if args.out else None
    output: dict[str, Any] = {}
    if args.max_part_bytes is not None:
        output["max_part_bytes"] = convert_flag("max_part_bytes", args.max_part_bytes, int)
    if args.test_fraction is not None:
        output["test_fraction"] = convert_flag("test_fraction", args.test_fraction, float)
    work_dir = work_dir_of(args) or RunConfig().work_dir
    for name in formats:
        written = api.export(work_dir, name, folder=folder, **output)
        print(f"{name}: {written.written} pairs in {written.folder}")
    return 0


def push(args: argparse.Namespace) -> int:
    work_dir = work_dir_of(args) or RunConfig().work_dir
    print(api.push(work_dir, args.repository, format=args.format, private=args.private))
    return 0


COMMANDS = {
    "export": Command(export, _export_arguments, notes=notes.PUBLISHED),
    "push": Command(push, _push_arguments, notes=notes.PUSHED),
}
