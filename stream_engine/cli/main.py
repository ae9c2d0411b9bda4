"""The command line: `stream-engine COMMAND ...`, also `python -m stream_engine`.

Exit status: 0 done; 1 an error of the user or the file system, in one line that says what to do;
2 finished, but shards or records failed (each is named) or no pair was written. torch is imported
only by commands that run a model.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stream_engine import __version__
from stream_engine.cli import commands, demo, notes, reports
from stream_engine.cli.flags import (
    LineParser,
    add_settings,
    field_docs,
    normalise,
    refuse_unknown,
)
from stream_engine.config import ModelConfig, nearest
from stream_engine.errors import ConfigError, StreamEngineError
from stream_engine.outputs.formats import EXPORTS
from stream_engine.ranks import Rank
from stream_engine.report import DEFAULT_ROWS
from stream_engine.text import describe, printable

LINGER_S = 3.0
WORK_DIR = "the run directory, or its URL in an object store (default work)"
LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")
"""What the deepspeed launcher puts before all arguments; the environment says the same."""


@dataclass(frozen=True)
class Command:
    """One command: what it does in a line, its own arguments, the function behind it, and what its
    help says below the flags."""

    summary: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]
    takes_settings: bool = False
    notes: str = ""


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--demo",
        action="store_true",
        help="the embedded models of the pipeline and, without --dataset_path, the embedded data",
    )
    parser.add_argument(
        "--failures_ok",
        action="store_true",
        help="exit 0 where it would be 2, for launchers that take any other status for a "
        "crash; `status --check` tells afterwards",
    )


def _work_dir_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    _run_arguments(parser)


def _work_arguments(parser: argparse.ArgumentParser) -> None:
    _work_dir_arguments(parser)
    parser.add_argument(
        "--shard", type=int, metavar="N", help="do this shard alone, in the foreground"
    )


def _retry_arguments(parser: argparse.ArgumentParser) -> None:
    _work_dir_arguments(parser)
    parser.add_argument(
        "--requeue_only",
        action="store_true",
        help="do not work: put failed shards and records back, for the workers of the next run",
    )


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    parser.add_argument("--work_dir", "--output_dir", metavar="TEXT", help=WORK_DIR)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit 2 when shards or records failed or no pair was written, 1 when work is left",
    )


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="an input, a dataset folder, or a work_dir with all its parts"
    )


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


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="SHARD|KEY", help="a shard's number, a key or your id")
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    parser.add_argument("--work_dir", "--output_dir", metavar="TEXT", help=WORK_DIR)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    parser.add_argument("--work_dir", "--output_dir", metavar="TEXT", help=WORK_DIR)
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to, on a disk; default: report/ in the work_dir"
    )
    parser.add_argument(
        "--rows",
        default=str(DEFAULT_ROWS),
        metavar="N",
        help="pairs drawn to be looked at one by one, by the run's seed; the extremes and some of "
        f"what was dropped come on top (default {DEFAULT_ROWS})",
    )


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", help=WORK_DIR)
    parser.add_argument(
        "id", metavar="ID", nargs="?", help="a pair as the report names it, a sample's key, your id"
    )
    parser.add_argument(
        "--limit", default="5", metavar="N", help="pairs to print without ID (default 5)"
    )
    parser.set_defaults(work_dir=None)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="PATH", help="a model's folder")
    parser.add_argument(
        "--reference",
        metavar="DUMP",
        help="what the original code computed, written by launch/dump_reference.py",
    )
    docs = field_docs(ModelConfig)
    parser.add_argument("--device", default="auto", metavar="TEXT", help=docs["device"])
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help=docs["dtype"],
    )
    parser.add_argument("--vision_tower_path", metavar="TEXT", help=docs["vision_tower_path"])


COMMANDS = {
    "run": Command(
        "shard what is new, run the models, merge: build the dataset or resume it",
        commands.run_command,
        _run_arguments,
        takes_settings=True,
        notes=notes.RUN,
    ),
    "append": Command(
        "add --dataset_path to a run and build what is new",
        commands.append,
        _work_dir_arguments,
        takes_settings=True,
        notes=notes.RUN,
    ),
    "shard": Command(
        "only read the input and cut it into shards",
        commands.shard,
        _work_dir_arguments,
        takes_settings=True,
        notes=notes.INPUT,
    ),
    "work": Command(
        "only run the models on the shards on hand",
        commands.work,
        _work_arguments,
        takes_settings=True,
    ),
    "merge": Command(
        "only build pairs and write the dataset",
        commands.merge,
        _work_dir_arguments,
        takes_settings=True,
        notes=notes.PAIRS + "\n" + notes.PUBLISHED,
    ),
    "retry-failed": Command(
        "try failed shards and quarantined records again, then merge",
        commands.retry_failed,
        _retry_arguments,
        takes_settings=True,
        notes=notes.RETRY,
    ),
    "plan": Command(
        "show what a run would do, and do nothing",
        commands.plan,
        _run_arguments,
        takes_settings=True,
    ),
    "status": Command(
        "show where a run stands", commands.status, _status_arguments, notes=notes.WORK_DIR
    ),
    "inspect": Command(
        "show what happened to a shard or sample, and how to do it again",
        commands.inspect,
        _inspect_arguments,
    ),
    "validate": Command(
        "check an input, a dataset, or a whole run",
        commands.validate,
        _validate_arguments,
        takes_settings=True,
        notes=notes.VALIDATED + "\n" + notes.INPUT,
    ),
    "export": Command(
        "write the pairs of a run in other formats (--format trl,ms_swift,...)",
        commands.export,
        _export_arguments,
        notes=notes.PUBLISHED,
    ),
    "push": Command(
        "bring a dataset to the Hugging Face hub, or go on where that was interrupted",
        commands.push,
        _push_arguments,
        notes=notes.PUSHED,
    ),
    "report": Command(
        "write a page to look at a run's counts and pairs",
        reports.report,
        _report_arguments,
        notes=notes.SHOWN,
    ),
    "show": Command("print pairs in the terminal", reports.show, _show_arguments),
    "verify-checkpoint": Command(
        "load a model strictly and check that it computes what it should",
        commands.verify,
        _verify_arguments,
    ),
    "demo": Command(
        "the embedded world: its data, its truth, and the loop closed on it",
        demo.demo,
        demo.add_arguments,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever its encoding lacks
    try:
        status = dispatch(list(sys.argv[1:] if argv is None else argv))
        linger(status)
        return status
    except StreamEngineError as error:
        linger(1)
        print(f"stream-engine: {printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stream-engine: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        linger(1)
        shown = printable(describe(error))
        print(f"stream-engine: {shown}; the same command resumes", file=sys.stderr)
        return 1


def dispatch(argv: list[str]) -> int:
    """Find the command, read its arguments and call it."""
    argv = [word for word in argv if not LOCAL_RANK.fullmatch(word)]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"stream-engine {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        known = nearest(name, list(COMMANDS)) or f"; choose from {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name!r}{known}")
    command = COMMANDS[name]
    parser = LineParser(
        prog=f"stream-engine {name}",
        description=command.summary,
        epilog=command.notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.arguments(parser)
    if command.takes_settings:
        add_settings(parser)
    args, unknown = parser.parse_known_args(normalise(rest))
    refuse_unknown(unknown, parser)
    return command.run(args)


def overview() -> str:
    """What `stream-engine --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: stream-engine COMMAND ...",
            "",
            "Builds DPO preference datasets for vision-language models.",
            "",
            *lines,
            "",
            "`stream-engine COMMAND --help` lists a command's flags. First steps:",
            "  stream-engine run --demo --work_dir work/demo",
        ]
    )


def linger(status: int) -> None:
    """Let a host's first worker leave first when the status is not 0.

    torchrun and deepspeed end all workers as soon as one exits so: then the first one has had its
    say, once, and the launcher reports its status.
    """
    if status and Rank.from_environment().local_rank:
        time.sleep(LINGER_S)
