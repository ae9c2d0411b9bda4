from __future__ import annotations

import json

import pytest

from tests.benchmarks import cost


def test_the_page_says_that_nothing_was_measured_and_where_each_number_comes_from() -> None:
    result = cost.costs(cost.Assumptions())
    page = cost.page(result)
    assert result["computed_not_measured"] and page.startswith("COMPUTED, NOT MEASURED")
    for name, assumption in result["assumptions"].items():
        assert assumption["source"]
        assert f"--{name}" in page and assumption["source"] in page


def test_dollars_follow_price_hours_and_cards() -> None:
    one = cost.costs(cost.Assumptions(price=1.0, gpus=1, launch_gaps=0.0))["ways"]["engine"]
    two = cost.costs(cost.Assumptions(price=3.0, gpus=2, launch_gaps=0.0))["ways"]["engine"]
    assert two["hours"] == pytest.approx(one["hours"] / 2, abs=0.01)
    assert two["dollars"] == pytest.approx(3 * one["dollars"], abs=0.05)
    spent = sum(one["milliseconds_a_question"].values()) / 1e3
    assert one["hours"] == pytest.approx(spent * 100_000 / 3600, rel=0.01)


def test_the_ways_differ_by_what_they_do_twice() -> None:
    """One answer, as many rows, no cache: a scorer that shares a prefix has nothing to gain."""
    same = cost.Assumptions(answers=1, vllm_rows=320, cached_reads=1.0)
    ways = {name: sum(parts.values()) for name, parts in cost.seconds_a_question(same).items()}
    assert ways["vllm_hf"] == pytest.approx(ways["engine"], rel=0.02)
    ways = {n: sum(p.values()) for n, p in cost.seconds_a_question(cost.Assumptions()).items()}
    assert ways["vllm_hf"] > 2 * ways["engine"]
    assert ways["engine"] < ways["vllm_cached"] < ways["vllm_vllm"]


def test_the_command_takes_every_assumption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["cost", "--json", "--price", "5", "--questions", "7"])
    cost.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["assumptions"]["price"]["value"] == 5
    assert printed["assumptions"]["questions"]["value"] == 7
