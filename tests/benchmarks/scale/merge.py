"""A merge of N questions, and of 1 % more: seconds, CPU seconds, memory of all processes.

Of each size: the first merge; one for which all rankings are there, as workers leave them; one
under other settings (`--rank 2`); and, after an append of 1 %, one under the first ones again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from stream_engine.pairs.merger import merge
from stream_engine.run_dir.paths import RunDir
from tests.benchmarks.scale.measuring import Figures, Keep, measured, module
from tests.benchmarks.scale.synthesis import (
    FINGERPRINTS,
    add_questions,
    config_of,
    pipeline_of,
    repeat_questions,
)

THIS = "tests.benchmarks.scale.merge"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=int, nargs="+", default=[10_000])
    parser.add_argument(
        "--distinct", type=int, help="make as many questions; further ones are these once more"
    )
    parser.add_argument("--keep", action="store_true", help="leave the runs where they are")
    parser.add_argument("--once", action="store_true", help="the first merge alone")
    parser.add_argument("--max_part_bytes", type=int, default=400_000_000)


def measure(arguments: argparse.Namespace, keep: Keep) -> Figures:
    """All sizes, one after the other."""
    figures: Figures = {"sizes": []}
    for num_questions in arguments.questions:
        folder = Path(tempfile.mkdtemp(prefix=f"merge-{num_questions}-", dir=arguments.workdir))
        try:
            figures["sizes"].append(measure_size(folder, num_questions, arguments))
        finally:
            if not arguments.keep:
                shutil.rmtree(folder)
        keep(figures)
    return figures


def measure_size(folder: Path, num_questions: int, arguments: argparse.Namespace) -> Figures:
    """One size."""
    distinct = min(num_questions, arguments.distinct or num_questions)
    add_questions(folder, distinct)
    repeat_questions(folder, num_questions)
    options = {"once": arguments.once, "max_part_bytes": arguments.max_part_bytes}
    return measure_run(folder, num_questions, distinct, **options)


def measure_run(
    folder: Path, num_questions: int, distinct: int, *, once: bool, max_part_bytes: int
) -> Figures:
    """The merges of a run that is made."""
    command = module(THIS, folder, "--max_part_bytes", max_part_bytes)
    figures: Figures = {"questions": num_questions, "distinct": distinct, "answers_each": 10}
    figures["results_mib"] = mib_below(folder / "results")
    figures["tars_mib"] = mib_below(folder / "shards")
    figures["first_merge"] = measured(command)
    figures["dataset_mib"] = mib_below(folder / "dataset")
    shutil.rmtree(folder / "dataset")
    figures["merge_with_rankings_of_workers"] = measured(command)
    if once:
        return figures
    figures["merge_with_rank_2"] = measured([*command, "--rank", "2"])
    figures["merge_with_rank_3_again"] = measured(command)
    add_questions(folder, num_questions // 100)
    figures["merge_after_append_of_1_percent"] = measured(command)
    return figures


def mib_below(folder: Path) -> int:
    """The files below a folder."""
    return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20)


def main() -> None:
    """Merge a synthesised run in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--max_part_bytes", type=int)
    arguments = parser.parse_args()
    options = {"rank": arguments.rank, "max_part_bytes": arguments.max_part_bytes}
    config = config_of(arguments.folder, **options)
    started = time.monotonic()
    report = merge(RunDir(arguments.folder), config, pipeline_of(config), FINGERPRINTS)
    print(
        json.dumps(
            {
                "candidates": report.candidates,
                "pairs": report.written,
                "parts": len(report.parts),
                "merge_s": round(time.monotonic() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
