"""Where models are kept: all side by side, or one at a time because they do not fit together.

Placement shapes speed, never results. `together` finishes a shard in one pass. `staged` does every
shard's rollouts first and the rewards after, and holds one model at a time in between; a stage
that needs several models (divide_and_conquer's rewards) changes them once a shard, so larger
shards (`--samples_per_shard`) pay there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stream_engine.config import ModelRole, RunConfig
from stream_engine.pipelines.base import Pipeline
from stream_engine.ranks import Rank
from stream_engine.servers import served

WEIGHTS_SHARE = 0.6
"""Share of a device's memory that weights may take; caches and activations need the rest."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SAFETENSORS_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class Placement:
    """How the models of a run share a device. Sizes in bytes, as loaded."""

    together: bool
    model_bytes: dict[str, int]  # by checkpoint path
    memory_bytes: int
    asked: str  # "auto", "together" or "staged"

    def line(self) -> str:
        """The decision and its reason, for the plan and the log."""
        total, largest = sum(self.model_bytes.values()), max(self.model_bytes.values(), default=0)
        held = "all models side by side" if self.together else "one model at a time"
        why = "as asked" if self.asked != "auto" else f"weights may take {WEIGHTS_SHARE:.0%}"
        return (
            f"{held}: {human_bytes(total)} together, the largest {human_bytes(largest)}, of "
            f"{human_bytes(self.memory_bytes)} memory a worker ({why})"
        )


def decide_placement(
    pipeline: Pipeline, config: RunConfig, *, memory_bytes: int, device: str
) -> Placement:
    """The placement for a device ("cpu", "cuda:0") with that much memory for this rank.

    Of a model that is split over ranks each one's part counts, as if all of it were split.
    """
    paths = dict.fromkeys(role.path for role in local_roles(pipeline))
    sizes = {
        path: loaded_bytes(Path(path), dtype=config.dtype, device=device) // config.tensor_parallel
        for path in paths
    }
    fits = config.offload == "nvme" or sum(sizes.values()) <= WEIGHTS_SHARE * memory_bytes
    together = fits if config.placement == "auto" else config.placement == "together"
    return Placement(together, sizes, memory_bytes, config.placement)


def local_roles(pipeline: Pipeline) -> list[ModelRole]:
    """The roles whose models are loaded here, and not asked on a server."""
    return [role for role in pipeline.roles() if served(role.path) is None]


def loaded_bytes(checkpoint: Path, *, dtype: str, device: str) -> int:
    """Bytes of a checkpoint's weights once loaded: in `dtype`, or what "auto" means on a device.

    Read from the headers of safetensors files; other files count with their size.
    """
    wanted = ITEM_BYTES.get(dtype) or (4 if device == "cpu" else None)
    total = 0
    for path in sorted(checkpoint.rglob("*.safetensors")):
        for numel, item_bytes in _tensors(path):
            total += numel * (wanted or item_bytes)
    if not total:
        for path in sorted(checkpoint.glob("*.bin")):
            total += path.stat().st_size * (wanted or 2) // 2
    return total


def _tensors(path: Path) -> Iterator[tuple[int, int]]:
    """(elements, bytes an element) of every tensor that a safetensors header lists."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, 1 << 27)))
    for name, entry in header.items():
        if name != "__metadata__":
            numel = 1
            for size in entry["shape"]:
                numel *= size
            yield numel, SAFETENSORS_BYTES.get(entry["dtype"], 2)


def worker_memory(device: str, rank: Rank, *, offload: str | None = None) -> int:
    """Bytes of memory that one rank's weights share: its part of a GPU's, or of the host's."""
    if device.startswith("cuda") and offload is None:
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        return total // rank.ranks_per_device(torch.cuda.device_count())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // rank.local_world_size


def human_bytes(count: float) -> str:
    """A size as people write it: `1.7 MB`, `14.1 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
