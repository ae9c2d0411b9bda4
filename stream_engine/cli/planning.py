"""The command that shows what a run would do: `plan`."""

from __future__ import annotations

import argparse

from stream_engine.cli.command import Command
from stream_engine.cli.launchers import launched_arguments
from stream_engine.cli.settings import config_from
from stream_engine.work.plan import plan_lines


def plan(args: argparse.Namespace) -> int:
    for line in plan_lines(config_from(args, make_demo_data=False)):
        print(line)
    return 0


COMMANDS = {"plan": Command(plan, launched_arguments, takes_settings=True)}
