"""A short, fixed part of the walk over faults of an object store."""

from __future__ import annotations

import json

import pytest

from tests.faults import requests


def test_the_first_trials_of_the_walk_find_nothing_bad(capsys: pytest.CaptureFixture[str]) -> None:
    assert requests.main(["--trials", "2", "--minutes", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trials"] == 2 and not found["bad"]
