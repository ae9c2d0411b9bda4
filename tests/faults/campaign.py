"""Trials: one command, harm of one kind, the same command again, and what came of it.

A trial is told by its seed alone.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.damage import damaged
from tests.faults.hook import Change, Deed, kind_of
from tests.faults.power import Replay, cut
from tests.faults.scenes import SCENES, Outcome, Scene, Stage, differences, facts
from tests.faults.stalls import stalled
from tests.faults.trial import Harm, run, start
from tests.faults.verdicts import Verdict, detail_of, faults_of_ends, faults_of_facts


class Campaign:
    """Makes trials on one stage."""

    def __init__(self, folder: Path) -> None:
        self.stage = Stage(folder)
        self.recorded: dict[str, list[Change]] = {}
        self.cuts: dict[str, tuple[Replay, list[Change]]] = {}

    def trial(self, seed: int, *, fault: str | None = None, scene: str | None = None) -> Verdict:
        """One trial; fault and scene are drawn unless they are given."""
        rng = random.Random(seed)
        drawn = rng.choice(list(FAULTS)), rng.choice(list(SCENES))
        fault, scene = fault or drawn[0], scene or drawn[1]
        verdict = FAULTS[fault](self, SCENES[scene], fault, rng)
        return verdict._replace(seed=seed)

    def changes(self, scene: Scene) -> list[Change]:
        """The changes that an undisturbed command makes."""
        if scene.name not in self.recorded:
            folder, work = self.stage.copy(scene.before)
            running = start(work, self.words(scene, work), folder, Harm("record"))
            ended = running.wait()
            assert ended.status in (0, 2), ended.output
            self.recorded[scene.name] = running.changes()
        return self.recorded[scene.name]

    def words(self, scene: Scene, work: Path, command: str | None = None) -> tuple[str, ...]:
        supplied = "supply" in scene.before
        return self.stage.words(command or scene.command, work, supplied=supplied)

    def expected(self, scene: Scene) -> Outcome:
        return self.stage.outcome((*scene.before, scene.command))

    def draw(self, scene: Scene, rng: random.Random) -> int:
        """The number of a change: first its kind is drawn, so that rare ones have their turn."""
        kinds: dict[tuple[str, str], list[int]] = {}
        for number, change in enumerate(self.changes(scene), start=1):
            kinds.setdefault((change.call, kind_of(change.path)), []).append(number)
        return rng.choice(kinds[rng.choice(list(kinds))])

    def again(self, scene: Scene, work: Path, folder: Path) -> tuple[list[str], str]:
        """The same command undisturbed, held against what it should leave.

        A shard that is named as failed is no fault where what the command says mends it.
        """
        before, expected, _ = self.expected(scene)
        ends = [run(work, self.words(scene, work), folder)]
        found = facts(work)
        if ends[0].status == 2 and names_failed_shard(ends[0].output):
            ends.append(run(work, self.words(scene, work, "requeue"), folder))
            ends.append(run(work, self.words(scene, work), folder))
            found = facts(work)
        faults = faults_of_ends(ends) + faults_of_facts(found, expected)
        if ends[-1].status != before.status and "hangs" not in faults:
            faults.append("stuck")
        return faults, detail_of(ends, differences(found, expected))


def names_failed_shard(output: str) -> bool:
    """Whether a command that ended says that shards failed for good."""
    return " failed + " in output and " + 0 failed + " not in output


def harmed(campaign: Campaign, scene: Scene, fault: str, rng: random.Random) -> Verdict:
    """A command is killed at a change, or that change fails; then the same command again.

    Now and then that one meets harm, too.
    """
    folder, work = campaign.stage.copy(scene.before)
    harms = [Harm(DEEDS[fault], campaign.draw(scene, rng)) for _ in range(rng.choice((1, 1, 1, 3)))]
    ends = [run(work, campaign.words(scene, work), folder, harm) for harm in harms]
    faults, detail = campaign.again(scene, work, folder)
    faults = faults_of_ends(ends, killed=fault == "kill") + faults
    if not faults:
        shutil.rmtree(folder)
    detail = f"{detail_of(ends, [])}\n{detail}"
    met = "; then ".join(f"{harm.at}: {end.met}" for harm, end in zip(harms, ends) if end.met)
    return Verdict(fault, scene.name, 0, met, tuple(dict.fromkeys(faults)), detail)


DEEDS: dict[str, Deed] = {"kill": "kill", "EIO": "eio", "ENOSPC": "enospc"}
FAULTS: dict[str, Callable[[Campaign, Scene, str, random.Random], Verdict]] = {
    **{name: harmed for name in DEEDS},
    "stall": stalled,
    "damage": damaged,
    "power cut": cut,
}
