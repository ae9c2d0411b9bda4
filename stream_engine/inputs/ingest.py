"""Ingest: inputs become shards, once, and new inputs become new shards.

    for each input not yet read:   read ─▶ reject | known | new ─▶ shard, manifest line
                                   quarantine file, then the input's own manifest line

A kill at any moment leaves whole shards and a manifest that lists them; the next ingest reads the
interrupted input again from its start, finds what is already there, and goes on where it ended.
Shards are not shared by two inputs, so that inputs given together or one by one give the same.
The caller holds the lease "ingest": there is one ingest at a time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import msgspec

from stream_engine.config import InputConfig
from stream_engine.errors import (
    ConservationError,
    NoPicturesError,
    ShardReadError,
)
from stream_engine.inputs.answers import ONE_ANSWER, UNREAD_PAIR, WITH_ANSWERS
from stream_engine.inputs.known import KnownSamples
from stream_engine.inputs.layouts import LATER_TURNS
from stream_engine.inputs.questions import FOREIGN_MARK
from stream_engine.inputs.readers import UNREADABLE_FILE, InputRow, read_rows
from stream_engine.inputs.rejects import TAKEN_IDS, QuarantineWriter, taken_id
from stream_engine.inputs.rows import IMAGE_COLUMNS
from stream_engine.inputs.sources import input_fingerprint
from stream_engine.inputs.unread import Unread
from stream_engine.pictures import CHANGES
from stream_engine.records import Failure, Sample, carried_hash
from stream_engine.run_dir.manifest import (
    InputInfo,
    Manifest,
    RowCounts,
    covers,
    reading_settings,
)
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_quarantine
from stream_engine.run_dir.shards import write_shard
from stream_engine.store import files
from stream_engine.store.local import remove_leftovers
from stream_engine.store.locations import canonical_source
from stream_engine.text import printable

logger = logging.getLogger(__name__)

ROWS_PER_PROGRESS = 50
ROWS_TO_JUDGE = 200
"""After as many rows without a picture it is plain that none is being read."""

GONE = "gone"
CARRIED = "carried"
NOTES = {
    **{name: f"pictures {words}" for name, words in CHANGES.items()},
    LATER_TURNS: "rows with later turns of the user: the first one is asked, alone",
    FOREIGN_MARK: "questions that mark pictures as other tools do (<ImageHere>, <|image_pad|>, "
    "[IMG] ...), asked as text: write <image> there, or nothing",
    WITH_ANSWERS: "rows with answers of their own: these are scored, and none is sampled",
    ONE_ANSWER: "rows whose answers are one: it is scored, but a pair needs two that differ, "
    "in one row",
    UNREAD_PAIR: "rows with chosen and rejected, which are left out: answers are sampled; "
    "--given_answers pairs scores these in their place",
    GONE: "samples of an earlier reading that the input no longer holds: they stay in the run",
    CARRIED: "rows of samples that the run holds with another ds_name, origin_dataset, "
    "origin_split or metainfos: those that were read first are kept",
}
"""What is told at the end of a reading, with its number."""

OnProgress = Callable[["IngestReport"], object]


class IngestReport(RowCounts, kw_only=True):
    """Rows of the inputs that were read: read = added + known + the rejected, by reason.

    What an interrupted ingest of the same input had added counts as added again.
    """

    num_shards: int = 0
    """Shards written by this call."""
    skipped_inputs: list[str] = msgspec.field(default_factory=list)
    """Inputs that were read to their end before and have not changed."""

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())


def ingest(
    run_dir: RunDir,
    sources: Sequence[str],
    config: InputConfig,
    *,
    first_shard: int = 0,
    on_progress: OnProgress | None = None,
) -> IngestReport:
    """Cut what is new in the sources into shards, no more than `config.questions` in those from
    `first_shard` on: the round at hand.

    `on_progress` gets the report so far, every 50 rows, before each shard is put in place and at
    the end of each input; it may raise to stop, and the rejects up to there are in the quarantine
    file then. Of an input that did not change, the files that could not be read are tried again by
    each call, and only those.

    Raises:
        ConfigError: when a source does not exist or its format is unknown.
        NoPicturesError: when no row of a source has one, and text alone is not allowed.
        ConservationError: when the counts do not add up.
    """
    report = IngestReport()
    if isinstance(run_dir.shards_dir, Path):
        remove_leftovers(run_dir.shards_dir)
    states = {canonical_source(source): input_fingerprint(source) for source in sources}
    manifest = Manifest.load(run_dir)
    to_read = {
        source: state
        for source, state in states.items()
        if manifest.is_left_to_read(source, state, config)
    }
    report.skipped_inputs = [source for source in states if source not in to_read]
    if not to_read:
        return report
    with KnownSamples(manifest.shards.lines()) as known:
        for source, state in to_read.items():
            part = within_round(config, manifest, source, first_shard)
            if part is not None:
                reading = InputReading(run_dir, manifest, known, source, part, report, on_progress)
                reading.run(state, first_shard)
    return report


def within_round(
    config: InputConfig, manifest: Manifest, source: str, first_shard: int
) -> InputConfig | None:
    """The settings to read an input with, `questions` being how many may come of it; None when the
    round has all its questions.

    Those that an interrupted reading took count again. An input that is to be read again for what
    was mended in it is read as far as it was, whatever the round has.
    """
    before = manifest.inputs.get(source)
    part = as_far_as_before(config, before)
    if config.questions is None:
        return part
    taken = manifest.num_samples_from(first_shard)
    resumed = sum(shard.num_samples for shard in manifest.unfinished_shards(source))
    if (left := config.questions - taken + resumed) > 0:
        return dataclasses.replace(part, questions=left)
    if before is not None and not before.fingerprint:
        return dataclasses.replace(part, questions=None, max_samples=before.max_samples)
    return None


def as_far_as_before(config: InputConfig, before: InputInfo | None) -> InputConfig:
    """The settings to read an input again with: never less of it than an earlier reading took."""
    if before is None or not covers(before, config.max_samples):
        return config
    return dataclasses.replace(config, max_samples=before.max_samples)


class InputReading:
    """One pass over one input."""

    def __init__(
        self,
        run_dir: RunDir,
        manifest: Manifest,
        known: KnownSamples,
        source: str,
        config: InputConfig,
        report: IngestReport,
        on_progress: OnProgress | None,
    ) -> None:
        self.run_dir = run_dir
        self.manifest = manifest
        self.known = known
        self.source = source
        self.config = config
        self.total = report
        self.before = RowCounts()
        self.counts = RowCounts()
        self.file_counts = RowCounts()
        self.file = ""
        self.unreadable: dict[str, RowCounts] = {}
        self.only: list[str] | None = None
        self.num_written = 0
        self.num_resumed = 0
        self.is_cut = False  # the round has all its questions, and there may be more rows
        self.unread = Unread()
        self.notes: Counter[str] = Counter()
        self.on_progress = on_progress or (lambda report: None)

    def run(self, fingerprint: str, first_shard: int) -> None:
        """Write the input's shards, its quarantine file and its line in the manifest.

        `first_shard` is of the round at hand.
        """
        self.known.begin_reading()
        self.known.set_pending(self.manifest.unfinished_shards(self.source))
        self.take_up(self.manifest.unreadable_files(self.source, fingerprint, self.config))
        before = self.manifest.inputs.get(self.source)
        with QuarantineWriter(self.run_dir, self.source) as self.quarantine:
            for failure in self.rejects_before():
                self.quarantine.write(failure)
            self.write_shards(self.new_samples())
            self.on_progress(self.total)
            quarantine = self.quarantine.finish()
        self.known.clear_pending()
        self.check_conservation()
        self.refuse_without_pictures()
        self.note_gone()
        counts = self.before.plus(self.counts)
        for line in [*self.unread.lines(), *note_lines(self.notes, self.unread.examples)]:
            logger.warning("%s: %s", self.source, line)
        self.manifest.append_input(
            InputInfo(
                source=self.source,
                fingerprint=fingerprint,
                settings=reading_settings(self.config),
                max_samples=counts.read if self.is_cut else self.config.max_samples,
                read=counts.read,
                added=counts.added,
                known=counts.known,
                rejected=counts.rejected,
                quarantine=quarantine,
                first_shard=first_shard,
                unreadable=self.unreadable,
                unread=list(self.unread.columns),
                left_out=self.unread.left_out,
                examples=self.unread.examples,
                notes=dict(self.notes),
            )
        )
        if before is not None and before.quarantine:
            files.erase(self.run_dir.quarantine(before.quarantine))

    def take_up(self, unreadable: list[str]) -> None:
        """Read these files alone when everything about the others is on hand.

        It is not when the quarantine file was lost or damaged, and with a limit it is not plain
        which rows are the first.
        """
        if not unreadable or self.config.max_samples is not None or self.config.questions:
            return
        self.only = unreadable
        self.before = self.manifest.inputs[self.source].readable_counts
        try:
            num_rejects = sum(1 for _ in self.rejects_before())
        except ShardReadError:
            num_rejects = -1
        if num_rejects != sum(self.before.rejected.values()):
            self.only, self.before = None, RowCounts()

    def rejects_before(self) -> Iterator[Failure]:
        """The rejects of the files that are not read again."""
        if self.only is not None:
            name = self.manifest.inputs[self.source].quarantine
            if name:
                path = self.run_dir.quarantine(name)
                yield from (f for f in read_quarantine(path) if f.source not in self.only)

    def write_shards(self, samples: Iterator[Sample]) -> None:
        """Cut the new samples into shards; the last one may be smaller."""
        rest = self.config.samples_per_shard - 1
        for first in samples:
            index = len(self.manifest.shards)
            tar = self.run_dir.shard(index)
            unlisted = files.version_of(tar)  # of an ingest that was killed before its line
            self.manifest.check_unchanged()
            shard = self.then_report(chain((first,), islice(samples, rest)))
            info = write_shard(tar, index, shard, over=unlisted)
            self.manifest.append_shard(info, source=self.source)
            self.num_written += info.num_samples
            self.total.num_shards += 1

    def then_report(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Report progress when a shard is full: the caller's last chance to stop it."""
        yield from samples
        self.on_progress(self.total)

    def new_samples(self) -> Iterator[Sample]:
        """The samples the run does not hold yet; everything else is counted."""
        for row in read_rows(self.source, self.config, only=self.only, unread=self.unread):
            if self.count(row):
                assert isinstance(row.item, Sample)
                yield row.item
            if self.counts.added == self.config.questions:
                self.is_cut = True
                return

    def count(self, row: InputRow) -> bool:
        """Count one row; True when it is a new sample."""
        item = row.item
        if isinstance(item, Failure):
            state = "rejected"
        else:
            state = self.classify(item)
            if state in TAKEN_IDS:
                item = taken_id(state, item, source=row.source, row=row.row)
            else:
                self.notes.update(row.notes)
        if row.source != self.file:
            self.file, self.file_counts = row.source, RowCounts()
        for counts in (self.counts, self.total, self.file_counts):
            counts.read += 1
            if isinstance(item, Failure):
                counts.rejected[item.reason] = counts.rejected.get(item.reason, 0) + 1
            elif state == "known":
                counts.known += 1
            else:
                counts.added += 1
        self.num_resumed += state == "pending"
        if isinstance(item, Failure):
            self.quarantine.write(item)
            if item.idx:
                self.known.touch(item.idx, self.source)
            if item.reason == UNREADABLE_FILE:
                self.unreadable[row.source] = self.file_counts
        if self.counts.read == ROWS_TO_JUDGE:
            self.refuse_without_pictures()
        if self.counts.read % ROWS_PER_PROGRESS == 0:
            self.on_progress(self.total)
        return state == "new"

    def classify(self, sample: Sample) -> str:
        """What a sample is to the run; what it carries that the run does not hold is noted."""
        state = self.known.classify(
            sample.idx,
            sample.key,
            self.source,
            carried=carried_hash(sample),
            is_shared=bool(sample.answers),
        )
        if state != "known_otherwise":
            return state
        self.notes[CARRIED] += 1
        self.unread.examples.setdefault(CARRIED, f"id {printable(sample.idx)!r}")
        return "known"

    def refuse_without_pictures(self) -> None:
        """Raise NoPicturesError when no row has a picture."""
        counts = self.before.plus(self.counts)
        if counts.read and counts.rejected.get("no_image") == counts.read:
            seen = ", ".join(map(printable, self.unread.seen)) or "none"
            absent = "".join(f" (no row has {printable(name)!r})" for name in self.unread.absent)
            raise NoPicturesError(
                f"{self.source}: no row has a picture. Columns: {seen}{absent}; pictures are read "
                f"from {', '.join(IMAGE_COLUMNS)}, or from yours by --columns image=NAME; "
                "--text_only allow asks questions without pictures",
                self.source,
            )

    def note_gone(self) -> None:
        """Count the samples that the input held once, when all of it was read now."""
        is_whole = self.only is None and self.config.max_samples is None and not self.is_cut
        if is_whole and (num_gone := self.known.num_gone(self.source)):
            self.notes[GONE] = num_gone

    def check_conservation(self) -> None:
        """Every row that was read is in a shard, was there before, or is in quarantine."""
        counts = self.counts
        num_added = self.num_written + self.num_resumed
        num_rejected = self.quarantine.num_written - sum(self.before.rejected.values())
        if counts.read != num_added + counts.known + num_rejected or counts.added != num_added:
            raise ConservationError(
                f"{self.source}: read {counts.read} rows, but added {num_added}, "
                f"known {counts.known}, rejected {num_rejected}"
            )


def note_lines(notes: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """What was done to rows, and what became of earlier ones, in a line each."""
    return [
        f"{count} {NOTES[name]}" + (f"; the first is {examples[name]}" if name in examples else "")
        for name, count in notes.items()
        if count
    ]
