from collections.abc import Iterator

import pytest
import torch
from stream_kernels.gpu import linear_logp, prefix_attention, prefix_split


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill what torch.empty makes with NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processors: the work is still split, into fewer programs for the interpreter to run."""
    for module in (linear_logp, prefix_attention, prefix_split):
        monkeypatch.setattr(module, "num_processors", lambda device: 8)
