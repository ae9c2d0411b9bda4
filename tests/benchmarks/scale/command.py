"""The command line of the benchmarks of scale."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests.benchmarks.scale import ingest, look, merge, workers
from tests.benchmarks.scale.measuring import Figures, load, machine, versions

SUBCOMMANDS: dict[str, ModuleType] = {
    "look": look,
    "workers": workers,
    "merge": merge,
    "ingest": ingest,
}


def main(arguments: Sequence[str]) -> None:
    """Run one subcommand; its figures so far are kept after each size."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks scale")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in SUBCOMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0].replace("%", "%%")
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--out", type=Path, help="also write the JSON here, after each size")
        command.add_argument("--workdir", type=Path, help="where runs are made; default: temporary")
        module.add_arguments(command)
    given = parser.parse_args(arguments)
    common = {
        "benchmark": f"scale {given.command}",
        "command": " ".join(["python -m tests.benchmarks scale", *arguments]),
        "machine": machine(),
        "versions": versions(),
        "load_before": load(),
    }

    def keep(figures: Figures) -> None:
        if given.out:
            given.out.write_text(json.dumps(common | figures, indent=1) + "\n")

    figures = SUBCOMMANDS[given.command].measure(given, keep)
    keep(figures)
    print(json.dumps(common | figures, indent=1))
