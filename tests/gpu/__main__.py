"""python -m tests.gpu OUT [--minutes 9] [--rehearse] [--only STEP ...]

Runs the steps one after the other, each in a process of its own with a time limit, and keeps in
OUT (8 files at most) what they found: summary.json, a log a step, a profiler trace. A step that
fails or hangs stops nothing. Exit status: 0 every step passed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.gpu.runner import LIMITS_S, run_steps


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--minutes", type=float, help="for all steps together (9; a rehearsal: 45)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on CPU, interpreted")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS_S), metavar="STEP")
    parser.add_argument(
        "--limit", nargs="+", default=[], metavar="STEP=S", help="seconds in place of its share"
    )
    arguments = parser.parse_args()
    minutes = arguments.minutes or (45 if arguments.rehearse else 9)
    share = 60 * minutes / sum(LIMITS_S.values())
    limits = {name: share * LIMITS_S[name] for name in arguments.only or LIMITS_S}
    for pair in arguments.limit:
        name, _, seconds = pair.partition("=")
        if name not in limits:
            parser.error(f"--limit {pair}: {name!r} is not among {[*limits]}")
        limits[name] = float(seconds)
    return run_steps(arguments.out.resolve(), limits, rehearse=arguments.rehearse)


if __name__ == "__main__":
    sys.exit(main())
