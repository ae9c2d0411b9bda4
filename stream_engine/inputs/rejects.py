"""The files of records that were rejected when inputs were read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from stream_engine.errors import ChangedError
from stream_engine.records import Failure, Sample
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import quarantine_name
from stream_engine.store import files
from stream_engine.store.base import Location

UNFINISHED = "-unfinished"


class QuarantineWriter:
    """The file of an input's rejected records.

    When the reading ends early they are kept under the name `<input>-unfinished`, to be looked at.
    """

    def __init__(self, run_dir: RunDir, source: str) -> None:
        digest = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
        self.prefix = f"input-{digest}"
        self.folder = run_dir.quarantine_dir
        self.num_written = 0
        self.is_finished = False

    def __enter__(self) -> QuarantineWriter:
        self.spool = files.spool(self.folder)
        return self

    def write(self, failure: Failure) -> None:
        self.spool.file.write(msgspec.json.encode(failure) + b"\n")
        self.num_written += 1

    def finish(self) -> str:
        """Put the file in place; returns its name, empty when nothing was rejected."""
        self.is_finished = True
        if (version := files.version_of(self.unfinished)) is not None:
            files.remove(self.unfinished, version)
        if not self.num_written:
            return ""
        name = quarantine_name(self.prefix)
        self.spool.publish(self.folder / name)
        return name

    @property
    def unfinished(self) -> Location:
        return self.folder / f"{self.prefix}{UNFINISHED}.jsonl"

    def __exit__(self, *exc_info: object) -> None:
        with self.spool:
            if self.num_written and not self.is_finished:
                with suppress(ChangedError):  # another reading says what it met
                    self.spool.publish(self.unfinished, files.version_of(self.unfinished))


def discard_refused(run_dir: RunDir, sources: Iterable[str]) -> None:
    """Remove what was kept of readings that ended early, of inputs other than these."""
    known = {QuarantineWriter(run_dir, source).unfinished for source in sources}
    for entry in files.list_files(run_dir.quarantine_dir):
        if entry.path.stem.endswith(UNFINISHED) and entry.path not in known:
            with suppress(ChangedError):
                files.remove(entry.path, entry.version)


TAKEN_IDS = {
    "changed": (
        "changed_row",
        "the row of id {!r} has changed since it was read; the run keeps what it read then. Give "
        "the new one another id, or read all in a new work_dir",
    ),
    "conflict": (
        "conflicting_id",
        "another sample of this input has the id {!r}; the first one is kept. Make the ids unique, "
        "or drop their column: ids are then made from the content",
    ),
}
"""What `KnownSamples.classify` says of a row whose id stands for another sample -> its reject."""


def taken_id(state: str, sample: Sample, *, source: str, row: int) -> Failure:
    """The reject of a row whose id belongs to another sample of its source already."""
    reason, detail = TAKEN_IDS[state]
    return Failure(
        reason=reason,
        detail=detail.format(sample.idx),
        source=source,
        row=row,
        key=sample.key,
        idx=sample.idx,
    )
