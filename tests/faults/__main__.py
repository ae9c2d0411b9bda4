"""python -m tests.faults [--minutes N] [--seed S] [--trials N] [--fault F] [--scene C] [--keep]

Walks at random over faults, and prints what came of them: a table of kind of fault by command, and
each bad trial with its seed. `--seed S --trials 1` makes that trial again. Exit status 1 when any
is bad.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.campaign import FAULTS, Campaign
from tests.faults.scenes import SCENES
from tests.faults.verdicts import Verdict, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    parser.add_argument("--trials", type=int)
    parser.add_argument("--fault", choices=list(FAULTS))
    parser.add_argument("--scene", choices=list(SCENES))
    parser.add_argument("--keep", action="store_true", help="the folder of trials")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"seed {args.seed}, in {folder}", flush=True)
    campaign = Campaign(folder / "stage")
    verdicts: list[Verdict] = []
    end = time.monotonic() + 60 * args.minutes
    for seed in itertools.count(args.seed):
        if time.monotonic() > end or len(verdicts) == args.trials:
            break
        verdict = campaign.trial(seed, fault=args.fault, scene=args.scene)
        verdicts.append(verdict)
        if verdict.faults:
            what = f"{verdict.fault}, {verdict.command}: {', '.join(verdict.faults)}"
            print(f"seed {seed}: {what}\n  at {verdict.met}\n{verdict.detail}", flush=True)
    print(table(verdicts))
    bad = [str(verdict.seed) for verdict in verdicts if verdict.faults]
    print(f"{len(verdicts)} trials, {len(bad)} bad" + (f": seeds {', '.join(bad)}" if bad else ""))
    if not args.keep and not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
