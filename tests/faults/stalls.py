"""A command is stopped at a change of a file for longer than its leases; another one completes.

Time is not waited for: the leases of the stopped process are made old. When it goes on, it finds
the world changed. It may end with one line or do what is left of its work, but what the other one
has published stands: the dataset is one that one of the two would write, and whole. Then both
commands are given again, and what is there must be as if they had come one after the other.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.scenes import Facts, Scene, dataset_facts, differences, facts, facts_in_any_order
from tests.faults.trial import Ended, Harm, run, start
from tests.faults.verdicts import Verdict, detail_of, faults_of_ends, faults_of_facts

if TYPE_CHECKING:
    from tests.faults.campaign import Campaign

HOUR_S = 3600.0
OTHERS = {
    "run": ("run", "append", "merge rank 1", "overwrite"),
    "shard": ("shard", "append"),
    "work": ("work", "append", "overwrite"),
    "merge": ("merge", "merge rank 1", "append", "overwrite"),
    "merge again": ("merge rank 1", "append", "overwrite", "run"),
    "append": ("append", "merge rank 1", "overwrite", "run"),
    "retry-failed": ("retry-failed", "append", "overwrite", "merge rank 1"),
    "overwrite": ("overwrite", "append", "merge rank 1"),
    "export": ("export", "merge rank 1", "append", "overwrite"),
}
"""What may come while a scene's command is stopped."""


def stalled(campaign: Campaign, scene: Scene, fault: str, rng: random.Random) -> Verdict:
    """One trial."""
    other = rng.choice(OTHERS[scene.name])
    at = campaign.draw(scene, rng)
    folder, work = campaign.stage.copy(scene.before)
    words, other_words = campaign.words(scene, work), campaign.words(scene, work, other)
    first = start(work, words, folder, Harm("stop", at))
    if not first.wait_until_stopped():
        first.wait()
        return Verdict(fault, scene.name, 0, "", ())
    make_leases_old(work)
    second = run(work, other_words, folder)
    published = dict(dataset_facts(work))
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGCONT)
    woken = first.wait()
    ends = [second, woken]
    faults, lines = faults_of_dataset(campaign, scene, other, work, folder, published)
    last = "" if scene.name != "export" else scene.command
    repeated = [words, other_words, *([words] if last else [])]
    ends += [run(work, again, folder) for again in repeated]
    commands = (*scene.before, scene.command, *([other] if other != scene.command else []))
    before, expected, in_any_order = campaign.stage.outcome((*commands, *([last] if last else [])))
    found = facts(work)
    if found != expected and "append" in commands and facts_in_any_order(work) == in_any_order:
        found = expected  # the other one was the first to read
    faults += faults_of_ends(ends) + faults_of_facts(found, expected)
    lines += differences(found, expected)
    if ends[-1].status != before.status and "hangs" not in faults:
        faults.append("stuck")
    if not faults:
        shutil.rmtree(folder)
    met = f"{at}: {woken.met}; meanwhile {other}"
    return Verdict(fault, scene.name, 0, met, tuple(dict.fromkeys(faults)), detail_of(ends, lines))


def make_leases_old(work: Path) -> None:
    """Have an hour gone by, as the leases tell it."""
    for path in (work / "leases").glob("*.json"):
        status = path.stat()
        os.utime(path, (status.st_atime, status.st_mtime - HOUR_S))


def faults_of_dataset(
    campaign: Campaign, scene: Scene, other: str, work: Path, folder: Path, published: Facts
) -> tuple[list[str], list[str]]:
    """What is wrong with the dataset when the stopped command has ended; with what differs."""
    found = dict(dataset_facts(work))
    if not (work / "dataset/README.md").exists():
        return ([], []) if not published else (["lost"], ["the dataset that the other published"])
    check = run(work, ("validate", str(work / "dataset")), folder)
    allowed = [published, *dataset_facts_of(campaign, scene, other)]
    if check.status != 0:
        return ["silent differences"], [f"after the wake: {line}" for line in problems(check)]
    if not any(same_rows(found, one) for one in allowed) and "append" not in (scene.name, other):
        return ["silent differences"], ["the dataset after the wake is neither one's"]
    return [], []


def dataset_facts_of(campaign: Campaign, scene: Scene, other: str) -> list[Facts]:
    """The datasets that either command leaves, alone or after the other."""
    both = (*scene.before, scene.command, other)
    return [campaign.stage.outcome(commands).facts for commands in (both[:-1], both)]


def same_rows(found: Facts, other: Facts) -> bool:
    """Whether `dataset/` holds the same files of rows."""

    def rows(one: Facts) -> Facts:
        return {name: one[name] for name in one if name.startswith("dataset/train-0")}

    return rows(found) == rows(other)


def problems(check: Ended) -> list[str]:
    return check.output.strip().splitlines()[:3]
