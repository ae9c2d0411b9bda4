"""The command line: `stream-engine COMMAND ...`, also `python -m stream_engine`.

Exit status: 0 done; 1 an error of the user or the file system, in one line that says what to do;
2 finished, but shards or records failed (each is named) or no pair was written. A command's module
is imported when it is called, and torch only by commands that run a model.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from stream_engine import __version__
from stream_engine.cli.command import Command, LineParser, normalise, refuse_unknown
from stream_engine.errors import ConfigError, StreamEngineError
from stream_engine.ranks import Rank
from stream_engine.text import describe, nearest, printable

LINGER_S = 3.0
LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")
"""What the deepspeed launcher puts before all arguments; the environment says the same."""


class Named(NamedTuple):
    """A command's module in this package, whose COMMANDS has it, and what it does in a line."""

    module: str
    summary: str


COMMANDS = {
    "run": Named(
        "working", "shard what is new, run the models, merge: build the dataset or resume it"
    ),
    "append": Named("working", "add --dataset_path to a run and build what is new"),
    "round": Named("working", "answer the next --questions by another model, in the same run"),
    "shard": Named("working", "only read the input and cut it into shards"),
    "work": Named("working", "only run the models on the shards on hand"),
    "merge": Named("working", "only build pairs and write the dataset"),
    "retry-failed": Named("working", "try failed shards and quarantined records again, then merge"),
    "plan": Named("planning", "show what a run would do, and do nothing"),
    "status": Named("looking", "show where a run stands"),
    "inspect": Named("looking", "show what happened to a shard or sample, and how to do it again"),
    "validate": Named("checking", "check an input, a dataset, or a whole run"),
    "export": Named(
        "publishing", "write the pairs of a run in other formats (--format trl,ms_swift,...)"
    ),
    "rank": Named(
        "publishing", "write the answers of a run with scores and ranks, or its best ones (--best)"
    ),
    "push": Named(
        "publishing", "bring a dataset to the Hugging Face hub, or go on where that was interrupted"
    ),
    "report": Named("reports", "write a page to look at a run's counts and pairs"),
    "show": Named("reports", "print pairs in the terminal"),
    "verify-checkpoint": Named(
        "checking", "load a model strictly and check that it computes what it should"
    ),
    "demo": Named("demo", "the embedded world: its data, its truth, and the loop closed on it"),
}

LOOKING = {"plan", "status", "inspect", "validate", "report", "show", "verify-checkpoint"}
"""Commands that begin nothing which could be resumed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever its encoding lacks
    try:
        status = dispatch(words)
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
        again = "" if set(words[:1]) & LOOKING else "; the same command resumes"
        print(f"stream-engine: {printable(describe(error))}{again}", file=sys.stderr)
        return 1


def open_closed_streams() -> None:
    """Put the null device where a standard stream is closed: the next file would come to stand
    there, and get whatever is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null := os.open(os.devnull, os.O_RDWR), number)
            if null != number:
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def dispatch(argv: list[str]) -> int:
    """Find the command, read its arguments and call it."""
    refuse_other_encodings(argv)
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
    command = command_of(name)
    parser = LineParser(
        prog=f"stream-engine {name}",
        description=COMMANDS[name].summary,
        epilog=command.notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.arguments(parser)
    booleans: frozenset[str] = frozenset()
    if command.takes_settings:
        from stream_engine.cli.flags import add_settings, boolean_flags

        add_settings(parser)
        booleans = boolean_flags()
    args, unknown = parser.parse_known_args(normalise(rest, booleans))
    refuse_unknown(unknown, parser)
    return command.run(args)


def refuse_other_encodings(argv: Sequence[str]) -> None:
    """Raise ConfigError for a word whose bytes are no text here: no file of a run could name it."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{word!r} is not in the encoding of this terminal; rename the file to UTF-8, or "
                "set LC_ALL=C.UTF-8"
            ) from error


def command_of(name: str) -> Command:
    """The command of that name, from its module."""
    module = importlib.import_module(f"stream_engine.cli.{COMMANDS[name].module}")
    command = module.COMMANDS[name]
    assert isinstance(command, Command), name
    return command


def overview() -> str:
    """What `stream-engine --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {named.summary}" for name, named in COMMANDS.items()]
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
    with suppress(ConfigError):  # of variables that no launcher sets, which is what is to be said
        if status and Rank.from_environment().local_rank:
            time.sleep(LINGER_S)
