"""The command that shows what a run would do: `plan`."""

from __future__ import annotations

import argparse

from stream_engine.cli.command import Command
from stream_engine.cli.launchers import launched_arguments
from stream_engine.cli.settings import config_from, rounds_left
from stream_engine.work.plan import plan_lines


def plan(args: argparse.Namespace) -> int:
    rounds = rounds_left(args, make_demo_data=False)
    config = rounds[0].config if rounds else config_from(args, make_demo_data=False)
    if rounds:
        print(f"round {rounds[0].number} of {rounds[0].of}:")
    for line in plan_lines(config):
        print(line)
    return 0


COMMANDS = {"plan": Command(plan, launched_arguments, takes_settings=True)}
