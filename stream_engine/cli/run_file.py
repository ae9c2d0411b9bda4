"""A file of settings as a command line names it, and the rounds that one may hold.

    work_dir: work/rounds
    dataset_path: questions.parquet
    reward_model_path: /models/reward
    questions: 4000
    rounds:
      - instruct_model_path: /models/start
      - instruct_model_path: /models/round-1
      - {instruct_model_path: /models/round-2, questions: 8000}

An entry of `rounds` says what differs in that round from what stands beside them. Knows names, and
of values only what round they are of.
"""

from __future__ import annotations

import argparse
from typing import Any

from stream_engine.config_file import load_config_file
from stream_engine.errors import ConfigError
from stream_engine.run_dir.next_round import OF_ALL_ROUNDS
from stream_engine.run_dir.rounds import OF_THIS_CALL

ROUNDS = "rounds"
ALIASES = {"output_dir": "work_dir"}  # the ancestor's name for it


def settings_in_file(path: str | None, number: int | None = None) -> dict[str, Any]:
    """The settings in a file by their names here, of the round of that number where it has rounds.

    Raises:
        ConfigError: for a file that has rounds where none is meant.
    """
    given = by_our_names(load_config_file(path)) if path else {}
    entries = given.pop(ROUNDS, None)
    if number is not None:
        return given | by_our_names(entries[number - 1])
    if entries is not None:
        raise ConfigError(
            f"{path}: `rounds` is for `stream-engine run` and `plan` alone; what works on a run "
            "that is there takes its settings without --config"
        )
    return given


def by_our_names(given: dict[str, Any]) -> dict[str, Any]:
    """Names as settings have them."""
    given = {str(name).replace("-", "_"): value for name, value in given.items()}
    return {ALIASES.get(name, name): value for name, value in given.items()}


def entries_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What differs in each round, of the file that a command line names; empty where it has none.

    Raises:
        ConfigError: for rounds that are no list of names and values, that say what holds for all
            rounds, or what the command line says otherwise.
    """
    path = args.config
    given = by_our_names(load_config_file(path)) if path else {}
    if ROUNDS not in given:
        return []
    entries = given[ROUNDS]
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: `rounds` is a list with an entry for each round")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not entry:
            raise ConfigError(
                f"{path}: round {number} must hold what differs in it, as in `- "
                f"instruct_model_path: /models/round-{number - 1}`, not {entry!r}"
            )
        for name in by_our_names(entry):
            if name in (*OF_THIS_CALL, *OF_ALL_ROUNDS, "overwrite"):
                raise ConfigError(
                    f"{path}: round {number}: {name} holds for all rounds: put it beside `rounds`"
                )
            if name in names_of_flags(args):
                raise ConfigError(
                    f"--{name}: {path} has one for round {number}; change it there, or leave it out"
                )
    return [by_our_names(entry) for entry in entries]


def names_of_flags(args: argparse.Namespace) -> list[str]:
    """The settings that a command line gives."""
    return [name for name, value in vars(args).items() if value is not None and name != "config"]
