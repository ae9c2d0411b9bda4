"""A rank's device: named, found, and made the current one."""

from __future__ import annotations

import functools

import pytest
import torch

from stream_engine import ranks
from stream_engine.errors import ConfigError
from stream_engine.ranks import Rank, planned_device, set_device

RANK = Rank(local_rank=3, threads_set=True)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Two CUDA devices that are not there; the list holds those made current."""
    made: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    return made


@pytest.mark.parametrize(
    ("asked", "device", "made"),
    [
        pytest.param("auto", "cuda:1", [1], id="by-local-rank"),
        pytest.param("cuda:1", "cuda:1", ["cuda:1"], id="by-name"),
        pytest.param("cpu", "cpu", [], id="cpu"),
    ],
)
def test_the_device_becomes_the_current_one(current, asked, device, made):
    """Triton launches on the current device: kernels for another's memory once went there."""
    assert set_device(RANK, asked) == device
    assert current == made


@pytest.mark.parametrize("asked", ["cuda", "cuda:1"])
def test_a_cuda_device_that_is_not_there_is_an_error(monkeypatch, asked):
    """Not a run on CPU, a hundred times slower and in another precision, that nobody asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=f"device is '{asked}', but torch .* finds no CUDA device"
    ):
        set_device(RANK, asked)
    assert set_device(RANK, "auto") == "cpu"


@pytest.mark.parametrize(
    ("names", "device"),
    [
        pytest.param(["null", "shm"], "cpu", id="no-driver"),
        pytest.param(["null", "nvidiactl"], "cuda:1", id="nvidia"),
        pytest.param(["kfd"], "cuda:1", id="amd"),
    ],
)
def test_a_plan_asks_torch_for_a_device_only_where_a_driver_is(
    current, monkeypatch, tmp_path, names, device
):
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(ranks.sys, "platform", "linux")
    monkeypatch.setattr(
        ranks, "has_device_files", functools.partial(ranks.has_device_files, tmp_path)
    )
    assert planned_device(RANK, "auto") == device
    assert planned_device(RANK, "cpu") == "cpu"
    assert planned_device(RANK, "cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("num_ranks", "num_devices", "sharing"),
    [(1, 1, 1), (8, 8, 1), (8, 2, 4), (3, 2, 2), (2, 8, 1)],
)
def test_ranks_of_a_host_share_its_devices(num_ranks, num_devices, sharing):
    rank = Rank(world_size=num_ranks, local_world_size=num_ranks)
    assert rank.ranks_per_device(num_devices) == sharing
