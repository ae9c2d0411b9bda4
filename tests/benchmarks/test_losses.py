"""The table of losses: a row is measured once, by one process; what a selection keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_engine.records import DatasetPair
from tests.benchmarks import losses
from tests.benchmarks.losses import Row
from tests.benchmarks.selections import SELECTIONS, JudgedPair

ROWS = [Row("dpo_reward", way, 1e-4, seed) for way in ("sigmoid", "ipo") for seed in (0, 1)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the rows that were trained for, in order."""
    names: list[str] = []

    def measure(row: Row, run: Path) -> dict[str, float]:
        names.append(row.name)
        return {"wrong": 1.0 + row.seed, "clauses": 3.0, "chosen_gain": -0.1, "steps": 150}

    monkeypatch.setattr(losses, "measured", measure)
    monkeypatch.setattr(losses, "plan", lambda: ROWS)
    monkeypatch.setattr(losses, "run_of", lambda runs, name: runs / name)
    return names


def test_a_row_that_is_kept_is_not_measured_again(measured: list[str], tmp_path: Path) -> None:
    out = tmp_path / "losses.json"
    losses.measure(out, tmp_path, until=float("inf"))
    losses.measure(out, tmp_path, until=float("inf"))
    assert measured == [row.name for row in ROWS] == list(losses.kept(out))
    line = next(line for line in losses.table(losses.kept(out)) if "ipo" in line)
    assert line.split()[:6] == ["dpo_reward", "ipo", "0.0001", "2", "1.50", "1.00"]


def test_fresh_seeds_have_a_line_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("dpo_reward", losses.ADVICE, 1e-4, seed) for seed in (2, 3, 4)]
    monkeypatch.setattr(losses, "plan", lambda: rows)
    figures = {"clauses": 4.0, "chosen_gain": 0.0, "steps": 150}
    kept = {
        row.name: figures | {"wrong": 0.1 * row.seed, "wrong_more": row.seed / 100} for row in rows
    }
    del kept[rows[0].name]["wrong_more"]
    chosen, fresh = (line.split()[6:] for line in losses.table(kept)[1:])
    assert chosen[:5] == ["1", "0.20", "0.20", "0.20", "-"]
    assert fresh[:5] == ["2", "0.35", "0.30", "0.40", "0.04"]


def test_a_row_that_another_process_measures_is_left_to_it(
    measured: list[str], tmp_path: Path
) -> None:
    with losses.claim(tmp_path, ROWS[0].name) as is_mine:
        assert is_mine
        losses.measure(tmp_path / "losses.json", tmp_path, until=float("inf"))
    assert measured == [row.name for row in ROWS[1:]]


def test_no_row_is_begun_when_the_time_is_up(measured: list[str], tmp_path: Path) -> None:
    losses.measure(tmp_path / "losses.json", tmp_path, until=0.0)
    assert measured == []


def test_half_of_the_pairs_are_those_with_the_most() -> None:
    row = DatasetPair(idx="", question="", images=(), chosen="", rejected="")
    pairs = [JudgedPair(row, chosen=-n, rejected=-1.5, margin_per_token=n) for n in range(4)]
    assert SELECTIONS["likely"](pairs) == pairs[:2]
    assert set(SELECTIONS["near"](pairs)) == set(pairs[1:3])
    assert SELECTIONS["margin_per_token"](pairs) == pairs[:1:-1]
    assert SELECTIONS["all"](pairs) == pairs
