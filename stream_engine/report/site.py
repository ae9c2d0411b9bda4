"""The report's folder: two pages, their style and scripts, and data that the pages load.

    index.html             counts, distributions, and what deserves a look
    pairs.html             one pair at a time; data/ and pictures/ are loaded as they are needed
    data/index.js          a line for each pair, to filter by; data/pairs-000.js ... the pairs
    pictures/              small copies of the pictures, made once
    report.json            what the report was made from; it says that the folder is ours

It opens from a disk as from a web server: data are scripts that call one function with JSON, since
pages from a disk may not fetch. A Content-Security-Policy allows no other host and no inline
script or style.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined

from stream_engine import __version__
from stream_engine.config import InputConfig
from stream_engine.errors import CheckpointError, ConfigError, RecordError
from stream_engine.models.hub import cached_folder
from stream_engine.models.pieces import load_pieces
from stream_engine.pictures import small_picture
from stream_engine.records import Sample
from stream_engine.report import DEFAULT_ROWS
from stream_engine.report.entries import Entry, Pieces, ShownPicture
from stream_engine.report.overview import SetAside, overview
from stream_engine.report.places import KEPT
from stream_engine.report.reading import FLIP, Found, entries, set_aside_entries
from stream_engine.report.rejected import AT_READING, rejected_entries
from stream_engine.report.run import ReportedRun
from stream_engine.report.survey import NO_CANDIDATE, Survey, survey
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.sealed import read_sealed, sealed
from stream_engine.run_dir.status import read_stats
from stream_engine.store.base import Location
from stream_engine.store.folders import FolderSwap
from stream_engine.text import printable

RECORD = "report.json"
ENTRIES_PER_FILE = 20
PICTURE_SIDE = 768
THUMB_SIDE = 96
MAX_FLIPS = 10
MAX_SEARCHED = 2_000
"""Characters of each text of a pair that the page's search looks into."""
STATIC = ("report.css", "theme.js", "pairs.js")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A report that was written."""

    page: str
    num_pairs: int
    num_shown: int
    num_bytes: int
    seconds: float


class Line(msgspec.Struct, kw_only=True):
    """What the list of pairs, its filters and the first page's links need of an entry."""

    id: str
    file: int
    fate: str
    label: str
    source: str
    margin: float | None
    words: tuple[int, int] | None
    tags: list[str]
    idx: str
    question: str
    text: str
    thumb: ShownPicture | None


def write_report(
    run: ReportedRun, folder: Location | None = None, *, num_rows: int = DEFAULT_ROWS, seed: int = 0
) -> Report:
    """Write a run's report, by default into its work directory.

    Args:
        num_rows: pairs that are drawn at random; extremes and what was dropped come on top.

    Raises:
        ConfigError: when the folder holds something else, or is no folder of a disk; for a negative
            `num_rows`.
        ShardReadError: when a result or shard is damaged.
    """
    if num_rows < 0:
        raise ConfigError(f"rows must be 0 or more, it is {num_rows}")
    started = time.monotonic()
    target = folder or run.run_dir.report_html.parent
    if not isinstance(target, Path):
        raise ConfigError(f"{target}: a report is looked at from a disk; give --out FOLDER")
    found = survey(run, num_rows=num_rows, seed=seed)
    aside = SetAside.read(run)
    with FolderSwap(target, is_ours) as swap:
        for name in STATIC:
            (swap.new / name).write_bytes(files(__package__).joinpath("static", name).read_bytes())
        pictures = Pictures(swap.new, target)
        lines = write_entries(swap.new, all_entries(run, found, aside), pictures)
        write_pages(swap.new, run, found, aside, lines)
        record = {
            "version": __version__,
            "dataset": run.stats.get("fingerprint", ""),
            "num_rows": num_rows,
            "seed": seed,
            "pictures": msgspec.to_builtins(pictures.made),
        }
        (swap.new / RECORD).write_bytes(sealed(record))
        swap.commit()
    return Report(
        page=str(target / "index.html"),
        num_pairs=found.num_kept,
        num_shown=sum(line.fate == KEPT for line in lines),
        num_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        seconds=time.monotonic() - started,
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a report, which a new one may replace."""
    return (folder / RECORD).is_file()


def is_current(run_dir: RunDir) -> bool:
    """Whether the work directory has a report of the dataset that is there."""
    record = read_sealed(run_dir.report_html.with_name(RECORD))
    return record is not None and record["dataset"] == read_stats(run_dir).get("fingerprint", "")


def all_entries(run: ReportedRun, found: Survey, aside: SetAside) -> Iterator[Found]:
    """Pairs and questions in the order of the run, then what was set aside or rejected."""
    yield from entries(run, found.shown, LazyPieces(run.config.instruct_model_path))
    yield from set_aside_entries(run, aside.at_stages())
    yield from rejected_entries(aside.at_reading(), run.config.part(InputConfig))


class LazyPieces:
    """The instruct model's tokens as text; the tokenizer is loaded when the first is asked for.

    Without the checkpoint, tokens are shown by their numbers.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint
        self.pieces: Pieces | None = None

    def __call__(self, token_ids: Any) -> list[str]:
        if self.pieces is None:
            try:
                self.pieces = load_pieces(cached_folder(self.checkpoint or ""))
            except CheckpointError:
                self.pieces = lambda ids: [f"#{token_id} " for token_id in ids]
        return self.pieces(token_ids)


@dataclass
class Pictures:
    """Writes small copies of pictures, each once; those of the report before are taken over."""

    new: Path
    old: Path

    def __post_init__(self) -> None:
        (self.new / "pictures").mkdir()
        record = read_sealed(self.old / RECORD) or {}
        self.before = msgspec.convert(record.get("pictures", {}), dict[str, ShownPicture])
        self.made: dict[str, ShownPicture] = {}

    def of(self, sample: Sample) -> list[ShownPicture]:
        """A sample's pictures; what cannot be decoded is left out."""
        names = [(f"{sample.key}-{i}", image.data) for i, image in enumerate(sample.images)]
        shown = [self.one(name, data, PICTURE_SIDE) for name, data in names]
        return [picture for picture in shown if picture is not None]

    def thumb(self, sample: Sample, shown: list[ShownPicture]) -> ShownPicture | None:
        """The first of a sample's pictures that can be shown, as large as a thumb."""
        if not shown:
            return None
        data = (self.new / shown[0].file).read_bytes()  # small already: quick to decode
        return self.one(f"{sample.key}-thumb", data, THUMB_SIDE)

    def one(self, name: str, data: bytes, longest: int) -> ShownPicture | None:
        if name in self.made:
            return self.made[name]
        if name in self.before and (self.old / self.before[name].file).is_file():
            shown = self.before[name]
            os.link(self.old / shown.file, self.new / shown.file)
        else:
            try:
                small = small_picture(data, longest=longest)
            except RecordError:
                return None
            file = f"pictures/{name}.{small.extension}"
            (self.new / file).write_bytes(small.data)
            shown = ShownPicture(file=file, width=small.width, height=small.height)
        self.made[name] = shown
        return shown


def write_entries(folder: Path, found: Iterator[Found], pictures: Pictures) -> list[Line]:
    """The data files; returns a line for each entry."""
    (folder / "data").mkdir()
    lines: list[Line] = []
    batch: list[Entry] = []

    def flush() -> None:
        number = (len(lines) - 1) // ENTRIES_PER_FILE
        write_call(folder / "data" / f"pairs-{number:03d}.js", "loadPairs", [number, batch])
        batch.clear()

    for entry, sample in found:
        entry.pictures = pictures.of(sample)
        thumb = pictures.thumb(sample, entry.pictures)
        lines.append(line_of(entry, len(lines) // ENTRIES_PER_FILE, thumb))
        batch.append(entry)
        if len(batch) == ENTRIES_PER_FILE:
            flush()
    if batch:
        flush()
    write_call(folder / "data" / "index.js", "loadIndex", [lines])
    return lines


def write_call(path: Path, function: str, arguments: list[Any]) -> None:
    """A script that hands JSON to a function of the page."""
    encoded = msgspec.json.encode(arguments)
    path.write_bytes(f"{function}(...".encode() + encoded + b");\n")


def line_of(entry: Entry, file: int, thumb: ShownPicture | None) -> Line:
    answers = {answer.index: answer for answer in entry.answers}
    texts = [entry.question]
    words = None
    if entry.chosen is not None and entry.rejected is not None:
        sides = answers[entry.chosen.index], answers[entry.rejected.index]
        words = (sides[0].words, sides[1].words)
        texts += [side.text for side in sides]
    return Line(
        id=entry.id,
        file=file,
        fate=entry.fate,
        label=label_of(entry.fate),
        source=entry.source,
        margin=entry.margin,
        words=words,
        tags=entry.tags,
        idx=entry.idx,
        question=printable(entry.question, limit=160),
        text="\n".join(text[:MAX_SEARCHED] for text in texts).lower(),
        thumb=thumb,
    )


def label_of(fate: str) -> str:
    """What became of a pair or question, in words."""
    if fate in NO_CANDIDATE:
        return f"no pair: {NO_CANDIDATE[fate]}"
    stage, colon, reason = fate.partition(": ")
    said = (reason or fate).replace("_", " ")
    if fate == KEPT:
        return said
    if stage == AT_READING and colon:
        return f"rejected when read: {said}"
    return f"set aside in {stage}: {said}" if colon else f"dropped: {said}"


def write_pages(
    folder: Path, run: ReportedRun, found: Survey, aside: SetAside, lines: list[Line]
) -> None:
    """Both pages, from their templates."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seen"] = lambda text, limit=200: printable(text, limit=limit)
    by_shown = {id(one): line for one, line in zip(found.shown, lines)}
    common = {
        "run": run,
        "lines": lines,
        "num_kept": found.num_kept,
        "num_shown": sum(line.fate == KEPT for line in lines),
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.created)),
        "version": __version__,
    }
    for name, more in {
        "index.html": {
            "view": overview(run, found, aside),
            "extremes": {
                name: [by_shown[id(one)] for one in shown] for name, shown in found.extremes.items()
            },
            "others": by_label(lines),
        },
        "pairs.html": {},
    }.items():
        page = environment.get_template(name).render(**common, **more)
        (folder / name).write_text(page, encoding="utf-8")


def by_label(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """What else deserves a look: lines by what became of their entries, and position flips."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line.fate != KEPT:
            found.setdefault(line.label, []).append(line)
        if FLIP in line.tags and len(found.setdefault(FLIP, [])) < MAX_FLIPS:
            found[FLIP].append(line)
    return found
