"""How a dataset comes to stand in its folder: whole, and never an older one over a newer one.

    dataset/train-00000-of-00002-1f0c8a2e.parquet   rows; the end of the name is their content's
    dataset/dataset_info.json, stats.json, README.md   replaced, in this order, the card last

Files of rows are put beside those of the dataset that stands, under names that no other content
has. Then the few files of fixed names are replaced, each only if it is still the one that was there
when this merge began; the card, whose `data_files` name exactly these rows, is the last, and from
then on `load_dataset` reads the new dataset. What the old one held is removed after that, its
pictures where the new one has none; files of others stay. A merge that was stopped for a while and
wakes up finds other versions, and ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from stream_engine.errors import ChangedError, ConfigError
from stream_engine.outputs.published import (
    CARD,
    IMAGES,
    RECORD,
    entries_of,
    is_ours,
    parts_of,
    read_record,
    recorded,
)
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.sealed import read_sealed
from stream_engine.store import files
from stream_engine.store.base import Entry, Location, Version

ROWS = re.compile(r"(train|test)(-\d{5}-of-\d{5})?-[0-9a-f]{8}(\.parquet|\.jsonl|/.+)")
"""Names of files of rows, and of folders of them, as `with_token` makes them."""
PICTURE = re.compile(rf"{IMAGES}/[0-9a-f]{{32}}\.\d+\.\w+")
OF_FORMATS = re.compile(r"assets/example\.\w+|train-logps\.parquet")
"""Fixed names that nobody else gives."""
BESIDE_ROWS = re.compile(rf"{OF_FORMATS.pattern}|assets/-|dataset_info\.json")
"""Names that a first publication may leave when it is ended before the record is written."""


class Publication:
    """One dataset on its way into a folder.

    Raises:
        ConfigError: when the folder holds files that are not ours.
    """

    def __init__(self, folder: Location) -> None:
        if not is_ours(folder) and holds_other_files(folder) and not is_begun(folder):
            raise ConfigError(f"{folder} holds other files; name a new or empty folder")
        if any(inner.name in (RECORD, CARD) for inner in files.list_folders(folder)):
            raise ConfigError(f"{folder}: {RECORD} or {CARD} is a folder there: take it away")
        self.folder = folder
        self.began = files.now(folder.parent)
        self.versions = {name: entry.version for name, entry in entries_of(folder).items()}
        self.recorded = recorded(read_sealed(folder / RECORD) or {})

    def put(self, scratch: Path, rows: Mapping[str, str], *, card: bytes, record: bytes) -> None:
        """Publish what lies in `scratch`, with card and record.

        Args:
            rows: the files of rows in `scratch`, and their names in the dataset.

        Raises:
            ChangedError: when another process has published a dataset there meanwhile.
        """
        names = [
            path.relative_to(scratch).as_posix()
            for path in sorted(scratch.rglob("*"))
            if path.is_file()
        ]
        fixed = [n for n in names if n not in rows and not n.startswith(f"{IMAGES}/")]
        self.check_unchanged()
        for name in names:
            if name not in fixed:
                files.take(scratch / name, self.folder / rows.get(name, name))
        mine = {name: files.version_of(self.folder / name) for name in rows.values()}
        try:
            for name in fixed:
                self.replace(name, (scratch / name).read_bytes())
            self.replace(RECORD, record)
            self.replace(CARD, card)
        except ChangedError:
            self.take_back(mine)
            raise
        self.remove_others({*rows.values(), *fixed, RECORD, CARD})
        if not (scratch / IMAGES).exists():
            remove_pictures(self.folder, before=self.began)

    def take_back(self, rows: Mapping[str, Version | None]) -> None:
        """Remove the rows of a dataset that did not come to stand."""
        stands = set(parts_of(self.folder))
        for name, version in rows.items():
            path = self.folder / name
            if path not in stands and files.version_of(path) == version:
                erase(self.folder, path)

    def check_unchanged(self) -> None:
        """Raise ChangedError when another dataset is there than when this merge began."""
        for name in (RECORD, CARD):
            if files.version_of(self.folder / name) != self.versions.get(name):
                raise ChangedError(self.folder / name)

    def replace(self, name: str, content: bytes) -> None:
        files.replace(self.folder / name, content, self.versions.get(name))

    def remove_others(self, names: set[str]) -> None:
        """Remove rows of earlier datasets, and what of ours the new one has not.

        Rows that were put there since this merge began are of one that comes after it.
        """
        for name, entry in entries_of(self.folder).items():
            if name in names:
                continue
            if ROWS.fullmatch(name):
                if entry.modified < self.began:
                    erase(self.folder, entry.path)
            elif name in self.versions and (name in self.recorded or OF_FORMATS.fullmatch(name)):
                with suppress(ChangedError):
                    files.remove(entry.path, self.versions[name])
                    files.erase(entry.path)  # an empty parquet file would fail who reads the folder


def refuse_other_dataset(folder: Location, name: str, *, run: Location) -> None:
    """Let no dataset be replaced that is another one than this format's of this run.

    Raises:
        ConfigError: when a folder that was named holds such a one.
    """
    held = (read_sealed(folder / RECORD) or {}).get("format")
    if held is not None and held != name:
        raise ConfigError(
            f"{folder} holds a dataset of format {held}, not {name}; name a new or empty folder"
        )
    other = folder.parent
    if held is not None and files.exists(RunDir(other).run_json) and not is_same(other, run):
        raise ConfigError(f"{folder} is the dataset of another run; name a new or empty folder")


def is_same(one: Location, other: Location) -> bool:
    """Whether two names are of one folder."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return one == other


def erase(folder: Location, path: Location) -> None:
    """Take a file of rows away, and the folder that was its own."""
    files.erase(path)
    if isinstance(path, Path) and path.parent != folder:
        with suppress(OSError):  # others' files are still in it
            path.parent.rmdir()


def remove_pictures(folder: Location, *, before: float) -> None:
    """Remove the picture files of earlier rows, those that were put there since then aside."""
    for entry in pictures_in(folder):
        if entry.modified < before:
            erase(folder, entry.path)


def pictures_in(folder: Location) -> list[Entry]:
    """The files of pictures that rows named."""
    found = files.list_files(folder / IMAGES)
    return [entry for entry in found if PICTURE.fullmatch(f"{IMAGES}/{entry.name}")]


def left_behind(folder: Location) -> list[Entry]:
    """Files of other datasets than the one that stands, under names that are ours: of publications
    that were ended, or that go on. None where the record does not tell which stands."""
    stats = read_record(folder)
    if stats is None:
        return []
    stands = recorded(stats)
    found = [
        entry
        for name, entry in entries_of(folder).items()
        if name not in stands and (ROWS.fullmatch(name) or OF_FORMATS.fullmatch(name))
    ]
    return found if f"{IMAGES}/" in stands else found + pictures_in(folder)


def other_publications(found: Sequence[Entry]) -> Iterator[str]:
    """A line on the files that `left_behind` finds."""
    if found:
        more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
        are = "are" if more else "is"
        yield (
            f"{found[0].path}{more}: {are} of another publication, which goes on or was ended; the "
            "next that writes this dataset takes such away"
        )


def remove_older_files(folder: Location) -> None:
    """Remove what a publication that was ended at its last step left of the dataset before, and
    what no process writes any more."""
    files.remove_leftovers(folder)
    record = files.stat(folder / RECORD)
    for entry in left_behind(folder):
        if record is not None and entry.modified < record.modified:
            erase(folder, entry.path)


def with_token(name: str, token: str) -> str:
    """The name of a file of rows, or of a pattern for them, that no other content has."""
    folder, slash, inner = name.partition("/")
    if slash:
        return f"{folder}-{token}/{inner}"
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{token}.{suffix}"


def is_begun(folder: Location) -> bool:
    """Whether a folder holds nothing but what a first publication put there before it was ended."""
    names = list(entries_of(folder))
    names += [f"{IMAGES}/{entry.name}" for entry in files.list_files(folder / IMAGES)]
    folders = files.list_folders(folder)
    if any(map(files.list_folders, folders)):
        return False
    names += [f"{inner.name}/-" for inner in folders if not files.list_files(inner)]
    has_rows = any(map(ROWS.fullmatch, names))
    return bool(names) and all(
        PICTURE.fullmatch(name)
        or name == f"{IMAGES}/-"
        or (has_rows and (ROWS.fullmatch(name) or BESIDE_ROWS.fullmatch(name)))
        for name in names
    )


def holds_other_files(folder: Location) -> bool:
    """Whether something is there that is not ours."""
    if isinstance(folder, Path) and folder.exists() and not folder.is_dir():
        return True
    return bool(files.list_files(folder) or files.list_folders(folder))
