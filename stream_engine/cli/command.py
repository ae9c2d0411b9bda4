"""What a command is, and how its line is read. Knows no setting and imports little, so that
commands which only look start at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from stream_engine.errors import ConfigError
from stream_engine.text import nearest

WORK_DIR = "the run directory, or its URL in an object store (default work)"


@dataclass(frozen=True)
class Command:
    """One command: its own arguments, the function behind it, and what its help says below the
    flags. What it does, in a line, stands in main.py."""

    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]
    takes_settings: bool = False
    notes: str = ""


class LineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors, so that they end as one line, status 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def normalise(argv: Sequence[str], booleans: Collection[str] = ()) -> list[str]:
    """Write every flag one way: underscores, and booleans with their value attached.

    `--sample-k=4` becomes `--sample_k=4`; `--debug` and `--debug True` become `--debug=true`;
    `--no-debug` becomes `--debug=false`. What follows a bare `--` is left alone.

    Args:
        booleans: names of the flags that are true or false.
    """
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*words, word, *rest]
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in booleans and not equals:
            spelled = rest and rest[0].lower() in ("true", "false")
            value, equals = (rest.pop(0).lower() if spelled else "true"), "="
        elif name.startswith("no_") and name[3:] in booleans and not equals:
            name, equals, value = name[3:], "=", "false"
        words.append(f"--{name}{equals}{value}")
    return words


def refuse_unknown(unknown: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raise ConfigError for the first argument nobody knows, with the nearest known flag."""
    if not unknown:
        return
    word = unknown[0].partition("=")[0]
    if not word.startswith("-"):
        raise ConfigError(
            f"unexpected argument {word!r}; give several values in one flag, separated by commas, "
            "and put a glob in quotes"
        )
    known = [option for action in parser._actions for option in action.option_strings]
    raise ConfigError(f"unknown flag {word}{nearest(word, known)} (see `{parser.prog} --help`)")


def work_dir_of(args: argparse.Namespace) -> str | None:
    """The work directory that a command line names, by its place or by its flag."""
    positional, flag = args.positional_work_dir, args.work_dir
    if positional is not None and flag is not None and positional != flag:
        raise ConfigError(f"two work directories: {positional} and {flag}")
    return positional or flag


def work_dir_given(args: argparse.Namespace) -> str:
    """The same, or the default where it names none."""
    from stream_engine.config import RunConfig

    return work_dir_of(args) or RunConfig().work_dir
