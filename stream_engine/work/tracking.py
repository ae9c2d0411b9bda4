"""A run as an experiment tracker shows it: progress, throughput, drops, and pairs at the end.

Off unless `--track` names a tracker, whose package is no dependency of ours. One worker of a run
tracks, the one that shows progress. A tracker that fails is no failure of the run: it is said once
and then left alone.
"""

from __future__ import annotations

import io
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError
from stream_engine.outputs.made_by import shown_settings
from stream_engine.outputs.reading import read_pairs
from stream_engine.outputs.validate import holds_dataset
from stream_engine.records import DatasetPair
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.text import describe
from stream_engine.work.progress import Progress

PROJECT = "stream_engine"
INTERVAL_S = 5.0
NUM_EXAMPLES = 12
COLUMNS = ("picture", "question", "chosen", "rejected", "margin")

logger = logging.getLogger(__name__)


class Backend(ABC):
    """One tracker: numbers by name at a time, and a table of pairs."""

    @abstractmethod
    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        """Begin a run of that name; `folder` is for what it keeps on disk."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name; steps never go back."""

    @abstractmethod
    def table(self, pairs: Sequence[DatasetPair]) -> None:
        """Pairs to look at, with their first picture."""

    @abstractmethod
    def finish(self) -> None:
        """Send what is left."""


class Wandb(Backend):
    """Weights & Biases; its own variables (WANDB_MODE, WANDB_PROJECT ...) hold."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        import wandb

        self.wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=PROJECT, name=name, config=dict(settings), dir=str(folder), reinit="create_new"
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def table(self, pairs: Sequence[DatasetPair]) -> None:
        rows = [
            [self.wandb.Image(picture) if picture else None, *texts]
            for picture, *texts in map(row_of, pairs)
        ]
        self.run.log({"pairs": self.wandb.Table(columns=list(COLUMNS), data=rows)})

    def finish(self) -> None:
        self.run.finish()


class Trackio(Backend):
    """trackio: on this machine's disk, or a Space, as its own variables say."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        import trackio

        self.trackio = trackio
        self.run = trackio.init(project=PROJECT, name=name, config=dict(settings), embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(values), step=step)

    def table(self, pairs: Sequence[DatasetPair]) -> None:
        rows = [texts for _, *texts in map(row_of, pairs)]
        found: dict[str, Any] = {"pairs": self.trackio.Table(columns=list(COLUMNS[1:]), data=rows)}
        pictures = (row_of(pair)[0] for pair in pairs)
        found |= {
            f"pictures/{number}": self.trackio.Image(picture, caption=pairs[number].question)
            for number, picture in enumerate(pictures)
            if picture
        }
        self.trackio.log(found)

    def finish(self) -> None:
        self.trackio.finish()


class Tensorboard(Backend):
    """TensorBoard's event files, under logs/tensorboard of the run directory."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        import tensorboard  # noqa: F401  without it torch's own message names no package
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("settings", markdown(("setting", "value"), settings.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def table(self, pairs: Sequence[DatasetPair]) -> None:
        import numpy

        rows = [row_of(pair) for pair in pairs]
        self.writer.add_text("pairs", markdown(COLUMNS[1:], (texts for _, *texts in rows)))
        for number, (picture, *_) in enumerate(rows):
            if picture:
                array = numpy.asarray(picture)
                self.writer.add_image(f"pairs/{number}", array, dataformats="HWC")

    def finish(self) -> None:
        self.writer.close()


def on_disk(logs: Location) -> Path:
    """Where a tracker writes files: beside the logs, or here when those are in an object store."""
    return logs if isinstance(logs, Path) else Path(f"{logs.parent.name}-logs")


BACKENDS: dict[str, type[Backend]] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": Tensorboard,
}


class Tracker:
    """What a run tells its tracker; does nothing where none is asked for."""

    def __init__(self, config: RunConfig, *, is_first: bool) -> None:
        """Begin, when `config.track` names a tracker and this is the run's first worker.

        Raises:
            ConfigError: when its package is not installed.
        """
        self.run_dir = RunDir(config.work_dir)
        self.backend: Backend | None = None
        self.last = 0.0
        self.step = 0
        if config.track is None or not is_first:
            return
        root = self.run_dir.root
        name = (root.resolve() if isinstance(root, Path) else root).name
        logs = self.run_dir.logs_dir
        try:
            kind = BACKENDS[config.track]
            self.backend = kind(name, shown_settings(config), on_disk(logs))
        except ImportError as error:
            raise ConfigError(
                f"track {config.track} needs a package: pip install {config.track} ({error})"
            ) from error
        except Exception as error:  # noqa: BLE001  a tracker's own errors are of any kind
            self.give_up(error)

    def progress(self, progress: Progress) -> None:
        """Counts and rates, every few seconds."""
        now = time.monotonic()
        if self.backend is None or now - self.last < INTERVAL_S:
            return
        self.last = now
        self.log(progress_values(progress))

    def finish(self) -> None:
        """The final statistics and some pairs, of the dataset on file."""
        if self.backend is None:
            return
        stats = files.read_bytes(self.run_dir.stats_json)
        if stats is not None:
            self.log(final_values(msgspec.json.decode(stats)))
        self.carefully(self.send_pairs)
        self.carefully(lambda backend: backend.finish())

    def send_pairs(self, backend: Backend) -> None:
        folder = self.run_dir.dataset_dir
        if holds_dataset(folder):
            backend.table(list(islice(read_pairs(folder), NUM_EXAMPLES)))

    def log(self, values: Mapping[str, float]) -> None:
        self.step += 1
        self.carefully(lambda backend: backend.log(values, self.step))

    def carefully(self, tell: Callable[[Backend], None]) -> None:
        """Tell the tracker something; once it failed it is told nothing more."""
        if self.backend is None:
            return
        try:
            tell(self.backend)
        except Exception as error:  # noqa: BLE001  a tracker's own errors are of any kind
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        logger.warning("not tracked any further: %s", describe(error))
        self.backend = None


def progress_values(progress: Progress) -> dict[str, float]:
    """The numbers of a run that goes on."""
    values: dict[str, float | None] = {
        "progress/questions": progress.samples_done,
        "progress/questions_total": progress.samples_total,
        "progress/shards": progress.shards_done,
        "progress/workers": len(progress.workers),
        "throughput/questions_per_s": progress.questions_per_s,
        "throughput/tokens_per_s": progress.tokens_per_s,
        "drops/records": progress.quarantined,
        "drops/shards": progress.shards_failed,
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def final_values(stats: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of stats.json: pairs, drops by reason, margin, lengths, the judge."""
    pairs, words = stats["pairs"], stats["words"]
    values: dict[str, float | None] = {
        "pairs/candidates": pairs["candidates"],
        "pairs/written": pairs["written"],
        "pairs/margin_mean": stats["margin"]["mean"],
        "pairs/words_chosen": words["chosen"]["mean"],
        "pairs/words_rejected": words["rejected"]["mean"],
        "pairs/longer_is_chosen": stats["length_wins"]["rate"],
        **{f"drops/{reason}": count for reason, count in pairs["dropped"].items()},
        **{f"judge/{name}": rate for name, rate in stats["judge"]["rates"].items()},
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def row_of(pair: DatasetPair) -> tuple[Any, str, str, str, float | None]:
    """A pair as a table's row: its first picture decoded, or None."""
    from PIL import Image

    picture = None
    if pair.images:
        picture = Image.open(io.BytesIO(pair.images[0].data)).convert("RGB")
    return picture, pair.question, pair.chosen, pair.rejected, pair.margin


def markdown(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table whose cells hold foreign text as text."""
    names = list(columns)
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return " ".join(text.split())
