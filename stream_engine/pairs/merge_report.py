"""What a merge says of itself, now or from the stats.json that it left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from stream_engine.outputs.parquet import Part
from stream_engine.outputs.published import RECORD, is_intact
from stream_engine.pairs.merge_inputs import MergeInputs, named_shards
from stream_engine.run_dir.sealed import read_sealed
from stream_engine.store import files
from stream_engine.store.base import Location


class FormatReport(msgspec.Struct, frozen=True, kw_only=True):
    """One format's dataset: candidates = written + dropped."""

    folder: str
    written: int
    dropped: dict[str, int]
    parts: list[Part]


class MergeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a merge wrote, or found up to date. Pair counts are of the first format."""

    candidates: int
    written: int
    dropped: dict[str, int]
    samples: dict[str, Any]
    """total = scored + the quarantined of each stage + missing; `rejected` came before that."""
    dataset: str
    parts: list[Part]
    formats: dict[str, FormatReport]
    missing_shards: list[int]
    is_new: bool
    """False when everything was up to date and nothing was written."""

    def summary(self) -> str:
        """The conservation of samples and pairs, in a line each."""
        aside = self.samples["quarantined"]
        parts = [f"{self.samples['scored']} scored"]
        parts += [f"{n} set aside ({stage})" for stage, n in aside.items() if n]
        if self.samples["missing"]:
            parts.append(f"{self.samples['missing']} in shards without results")
        lines = [
            f"samples: {self.samples['total']} = {' + '.join(parts)}",
            f"pairs: {balance_line(self.candidates, self.written, self.dropped)}",
        ]
        for name, report in list(self.formats.items())[1:]:
            line = balance_line(self.candidates, report.written, report.dropped)
            lines.append(f"pairs ({name}): {line}")
        if self.missing_shards:
            lines.append(f"left out: {named_shards(self.missing_shards)}")
        return "\n".join(lines)


def is_current(folder: Location, inputs: MergeInputs, made_from: str) -> bool:
    """Whether a folder's dataset is whole, made from this, and no older than any result."""
    stats = read_stats(folder)
    if stats is None or stats.get("fingerprint") != made_from:
        return False
    if not is_intact(folder, stats):
        return False
    record = files.stat(folder / RECORD)
    return record is not None and inputs.newest <= record.modified


def read_stats(folder: Location) -> dict[str, Any] | None:
    """The stats.json of a dataset; None when there is none, or it is damaged."""
    return read_sealed(folder / RECORD)


def read_report(folders: Mapping[str, Location], *, is_new: bool) -> MergeReport:
    """The report of datasets on file."""
    stats = {name: read_stats(folder) for name, folder in folders.items()}
    formats = {
        name: FormatReport(
            folder=str(folders[name]),
            written=one["pairs"]["written"],
            dropped=one["pairs"]["dropped"],
            parts=msgspec.convert(one["parts"], list[Part]),
        )
        for name, one in stats.items()
        if one is not None
    }
    first = next(iter(folders))
    one = stats[first]
    assert one is not None, f"{folders[first]} was just written"
    return MergeReport(
        candidates=one["pairs"]["candidates"],
        written=formats[first].written,
        dropped=formats[first].dropped,
        samples=one["samples"],
        dataset=str(folders[first]),
        parts=formats[first].parts,
        formats=formats,
        missing_shards=one["missing_shards"],
        is_new=is_new,
    )


def balance_line(candidates: int, written: int, dropped: Mapping[str, int]) -> str:
    """`12 candidates = 9 written + 3 dropped (same_text 2, max_pairs_per_sample 1)`."""
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items()) if n)
    shown = f" ({reasons})" if reasons else ""
    return f"{candidates} candidates = {written} written + {sum(dropped.values())} dropped{shown}"
