"""A short, fixed part of the campaign (`python -m tests.faults` walks on at random)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest

from tests.faults.campaign import FAULTS, Campaign
from tests.faults.scenes import facts
from tests.faults.verdicts import Verdict, faults_of_facts, table

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="see hook.py: pathlib")
TRIALS = {
    "kill": [("run", 1), ("append", 2), ("merge again", 3), ("retry-failed", 4), ("shard", 5)],
    "EIO": [("run", 1), ("work", 2), ("export", 1010)],
    "ENOSPC": [("run", 1), ("work", 20), ("append", 3)],
    "damage": [("run", 106), ("merge", 1), ("export", 119), ("append", 29), ("overwrite", 4)],
    "power cut": [("run", 1), ("append", 2), ("merge again", 30), ("retry-failed", 4), ("work", 5)],
    "stall": [("run", 1), ("append", 2), ("overwrite", 3), ("shard", 1000), ("merge", 5)],
}
"""Scene and seed, by kind of fault."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    folder = tmp_path_factory.mktemp("campaign")
    yield Campaign(folder / "stage")
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("fault", "scene", "seed"),
    [(fault, *trial) for fault, trials in TRIALS.items() for trial in trials],
)
def test_the_same_command_again_gives_the_undisturbed_outcome(
    campaign: Campaign, fault: str, scene: str, seed: int
) -> None:
    verdict = campaign.trial(seed, fault=fault, scene=scene)
    assert verdict.met, "no harm was done"
    assert not verdict.faults, f"{verdict.faults} at {verdict.met}\n{verdict.detail}"


def test_every_kind_of_fault_is_tried(campaign: Campaign) -> None:
    assert TRIALS.keys() == FAULTS.keys()


def test_what_is_lost_doubled_or_changed_is_seen(campaign: Campaign) -> None:
    _, work = campaign.stage.copy(("run",))
    expected = facts(work)
    assert faults_of_facts(facts(work), expected) == []
    (rows,) = (work / "dataset").glob("train-0*")
    rows.write_bytes(rows.read_bytes()[:-1])
    assert faults_of_facts(facts(work), expected) == ["silent differences"]
    rows.rename(rows.with_name("train-x.parquet"))
    assert faults_of_facts(facts(work), expected) == ["lost", "doubled"]


def test_the_table_counts_trials_that_met_their_change() -> None:
    verdicts = [
        Verdict("kill", "run", 1, "3: link x", ()),
        Verdict("kill", "run", 2, "4: link x", ("lost", "hangs")),
        Verdict("kill", "run", 3, "", ()),
    ]
    head, row, _ = table(verdicts).splitlines()
    found = dict(zip(head.split(), row.split()))
    assert (found["tried"], found["recovered"], found["lost"], found["hangs"]) == (*"2111",)
