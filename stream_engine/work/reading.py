"""Taking up inputs: one worker reads what nobody has read yet, the others wait for its shards.

Knows nothing of models. Too large a share of bad records stops the run early.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from stream_engine.config import STAGES, InputConfig, RunConfig, Stage
from stream_engine.errors import ConfigError, LeaseLostError, NoPicturesError
from stream_engine.inputs.ingest import IngestReport, ingest
from stream_engine.inputs.rejects import discard_refused
from stream_engine.inputs.sources import input_fingerprint
from stream_engine.run_dir.next_round import refuse_old_round
from stream_engine.run_dir.run_json import forget_source
from stream_engine.run_dir.state import RunState
from stream_engine.store.leases import Lease, Wait
from stream_engine.store.locations import canonical_source
from stream_engine.work.catching import caught

logger = logging.getLogger(__name__)

T = TypeVar("T")

INGEST_LEASE = "ingest"
MIN_RECORDS_TO_JUDGE = 200
VERIFY_S = 1.0
"""How often a reader asks whether it still holds the lease."""


class InputQueue:
    """The inputs that one launch of a worker has to see read, by itself or by another."""

    def __init__(
        self, state: RunState, config: RunConfig, *, worker: str, show: Callable[[str], None]
    ) -> None:
        """`show` is told how far reading is."""
        self.state = state
        self.run_dir = state.run_dir
        self.config = config
        self.settings = config.part(InputConfig)
        self.max_bad_fraction = config.max_bad_fraction
        self.worker = worker
        self.show = show
        self.unread: dict[str, str] = {}
        self.limits: dict[str, int | None] = {}
        self.manifest_start = 0
        self.num_added = 0
        self.held: Lease | None = None
        timeout_s = config.lease_timeout_s
        self.wait = Wait(self.run_dir.leases_dir, INGEST_LEASE, timeout_s=timeout_s)
        self.verified = 0.0

    def begin(self, *, read_input: bool) -> None:
        """Note which inputs there are, and in which state; `state` is fresh."""
        if read_input and self.config.run_stage in (None, 0):
            marks = {path: self.mark_of(path) for path in self.config.dataset_path}
            self.unread = {path: mark for path, mark in marks.items() if mark is not None}
            self.take_up_forgotten_inputs()
        self.manifest_start = self.state.manifest.end

    def mark_of(self, path: str) -> str | None:
        """What tells an input's present content; None where it is gone, and nothing of it is left
        to read."""
        try:
            return input_fingerprint(path)
        except ConfigError as error:
            info = self.state.manifest.inputs.get(canonical_source(path))
            if info is None or self.is_half_read(path):
                raise
            logger.warning("%s; the %d records that were read of it stay", error, info.read)
            return None

    def read(self) -> bool:
        """Read inputs that nobody has read yet; False while another worker is at it."""
        if not self.unread_sources():
            return True
        lease = self.lease()
        if lease is None:
            self.wait.tell()
            return False
        try:
            with lease:
                self.held = lease
                self.read_all()
        except LeaseLostError as error:
            logger.warning("%s", error)
            return False  # another worker reads them now
        self.unread = {}
        return True

    def read_all(self) -> None:
        """Read the inputs that are left to read, under the lease.

        Raises:
            ConfigError: when the run has gone on to another round meanwhile.
        """
        refuse_old_round(self.state)
        self.state.refresh()
        sources = self.unread_sources()
        named = [source for source in sources if source not in self.limits]
        for group in (named, *([source] for source in sources if source in self.limits)):
            if group:
                logger.info("reading %s", ", ".join(group))
                self.num_added += self.ingest(group).added

    def ingest(self, sources: list[str]) -> IngestReport:
        """Read some inputs; what is refused as a whole, with nothing taken of it, is forgotten."""
        settings = self.reading_settings(sources[0])
        num_shards = len(self.state.manifest.shards)
        try:
            report = ingest(
                self.run_dir,
                sources,
                settings,
                first_shard=self.state.fingerprints.first_shard,
                on_progress=self.ingest_progress,
            )
        except ConfigError as error:
            manifest = self.state.refresh().manifest
            named = [error.source] if isinstance(error, NoPicturesError) else sources
            if isinstance(error, NoPicturesError) or len(manifest.shards) == num_shards:
                for source in map(canonical_source, named):
                    if source not in manifest.inputs:
                        forget_source(self.run_dir, source)
            raise
        discard_refused(self.run_dir, self.state.refresh().manifest.inputs)
        logger.info("%s", describe_ingest(report))
        return report

    def unread_sources(self) -> list[str]:
        """The inputs that are left to read.

        One that anybody has read since this worker began is not, although it may look changed from
        here, or hold files that could not be read: those are tried once a launch, not by each of
        its workers in turn.
        """
        manifest = self.state.manifest
        return [
            source
            for source, mark in self.unread.items()
            if manifest.is_left_to_read(source, mark, part := self.reading_settings(source))
            and not manifest.was_read_since(self.manifest_start, source, part)
            and (not self.has_all_questions() or self.is_half_read(source))
        ]

    def has_all_questions(self) -> bool:
        """Whether the round at hand has as many questions as it is to take."""
        if self.settings.questions is None:
            return False
        first = self.state.fingerprints.first_shard
        return self.state.manifest.num_samples_from(first) >= self.settings.questions

    def is_half_read(self, source: str) -> bool:
        """Whether a reading of an input was interrupted, or it is to be read again."""
        manifest, source = self.state.manifest, canonical_source(source)
        info = manifest.inputs.get(source)
        is_forgotten = info is not None and not info.fingerprint
        return is_forgotten or any(True for _ in manifest.unfinished_shards(source))

    def take_up_forgotten_inputs(self) -> None:
        """Add the inputs that are to be read again, whoever named them: each with its own limit."""
        named = {canonical_source(source) for source in self.unread}
        for source, info in self.state.manifest.inputs.items():
            if not info.fingerprint and source not in named:
                mark = caught(functools.partial(input_fingerprint, source))
                if isinstance(mark, Exception):
                    logger.warning("its rejected records are not read again: %s", mark)
                else:
                    self.unread[source] = mark
                    self.limits[source] = info.max_samples

    def reading_settings(self, source: str) -> InputConfig:
        part = self.settings
        if source in self.limits:
            part = dataclasses.replace(part, max_samples=self.limits[source], questions=None)
        return part

    def ingest_progress(self, report: IngestReport) -> None:
        """Show how far reading is; stop it when the data are plainly wrong or the lease is lost."""
        if self.held is not None and time.monotonic() - self.verified > VERIFY_S:
            self.held.verify()
            self.verified = time.monotonic()
        rejected = sum(report.rejected.values())
        refuse_bad_input(report.rejected, report.read, self.max_bad_fraction)
        self.show(f"reading input: {report.read} records, {rejected} rejected")

    def check_bad_fraction(self) -> None:
        """Stop early when too large a share was rejected by the reader or set aside by the stages.

        Each is judged by what it has looked at: the input may be read long before a stage begins.
        """
        limit = self.max_bad_fraction
        inputs = self.state.manifest.inputs.values()
        rejected = sum((Counter(info.rejected) for info in inputs), Counter[str]())
        refuse_bad_input(rejected, sum(info.read for info in inputs), limit)
        aside = {stage: self.state.num_quarantined(stage) for stage in STAGES}
        if not any(aside.values()):
            return
        seen = sum(header.num_samples for header in self.state.headers("rollouts"))
        refuse_bad_samples(aside, seen, limit)

    def lease(self) -> Lease | None:
        return Lease.acquire(
            self.run_dir.leases_dir,
            INGEST_LEASE,
            worker_id=self.worker,
            timeout_s=self.config.lease_timeout_s,
        )


def refuse_bad_input(rejected: Mapping[str, int], read: int, max_fraction: float) -> None:
    """Raise ConfigError when the reader rejected too large a share of the records."""
    if is_mostly_bad(rejected, read, max_fraction):
        raise ConfigError(
            f"the reader rejected {sum(rejected.values())} of the first {read} records, more than "
            f"max_bad_fraction {max_fraction:g} (most of them: {largest(rejected)}); correct the "
            "input, whose bad rows are named in quarantine/ of the work_dir, or raise "
            "--max_bad_fraction"
        )


def refuse_bad_samples(aside: Mapping[Stage, int], done: int, max_fraction: float) -> None:
    """Raise ConfigError when the stages set aside too large a share of their samples."""
    if is_mostly_bad(aside, done, max_fraction):
        raise ConfigError(
            f"{sum(aside.values())} of the first {done} samples were set aside, more than "
            f"max_bad_fraction {max_fraction:g} (most of them by {largest(aside)}); mend what "
            "quarantine/ of the work_dir names and run `stream-engine retry-failed`, or raise "
            "--max_bad_fraction"
        )


def is_mostly_bad(bad: Mapping[Any, int], looked_at: int, max_fraction: float) -> bool:
    """Whether the share of bad ones is too large; fewer than 200 are not judged."""
    return looked_at >= MIN_RECORDS_TO_JUDGE and sum(bad.values()) > max_fraction * looked_at


def largest(counts: Mapping[T, int]) -> T:
    return max(counts, key=lambda name: counts[name])


def describe_ingest(report: IngestReport) -> str:
    """What reading brought, in one line."""
    rejected = ", ".join(f"{n} {reason}" for reason, n in sorted(report.rejected.items()))
    return (
        f"read {report.read} records: {report.added} new, {report.known} known, "
        f"{sum(report.rejected.values())} rejected" + (f" ({rejected})" if rejected else "")
    )
