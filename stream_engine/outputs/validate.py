"""`stream-engine validate` of what was written: is this dataset what its trainer accepts?

A problem is one line that names the file, the row and the rule. An empty list means: fine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from stream_engine.outputs.formats import FORMATS
from stream_engine.outputs.formats.base import (
    ANSWER_EXTRAS,
    EXTRAS,
    SPLITS,
    ParquetFiles,
    split_named,
)
from stream_engine.outputs.parquet import arrow_schema, rows_of
from stream_engine.outputs.publication import left_behind, other_publications
from stream_engine.outputs.published import (
    file_problems,
    is_ours,
    parts_of,
    read_record,
    recorded,
    unreadable,
)
from stream_engine.outputs.row_checks import CHECKS, Check, Row
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rounds import run_file_as_read
from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.store.files import location
from stream_engine.store.locations import is_url
from stream_engine.store.objects import is_object_url

MAX_PROBLEMS = 100
RESERVED_TRL_COLUMNS = frozenset(("image", "label", "messages", "completion"))
LATE_IMAGES = "the first row with images is not the first of all; `images` may not load"
OPTIONAL_COLUMNS = frozenset(("logps", *EXTRAS, *ANSWER_EXTRAS)) - {"idx"}

FEATURES = {name: kind.features for name, kind in FORMATS.items() if issubclass(kind, ParquetFiles)}

OWN_COLUMNS = {
    "ranked": {"question", "answers"},
    "trl_kto": {"prompt", "completion", "label"},
    "trl_sft": {"prompt", "completion"},
    "trl": {"prompt", "chosen", "rejected"},
    "llama_factory": {"conversations", "chosen", "rejected"},
    "ms_swift": {"messages", "rejected_response"},
    "rlaifv": {"question", "chosen", "rejected"},
    "trl_reward": {"chosen", "rejected"},
}
"""By which a parquet file is known: the first whose columns it has."""


def validate(path: str | Location) -> list[str]:
    """The problems of a run directory's datasets, or of one dataset.

    At most the first hundred are listed; a last line says that there are more.
    """
    return at_most(find_problems(location(path)))


def at_most(found: Iterator[str]) -> list[str]:
    """The first problems, and a line that says so when there are more."""
    problems = list(islice(found, MAX_PROBLEMS + 1))
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"and more; the first {MAX_PROBLEMS} are listed"]
    return problems


def is_dataset(path: str | Location) -> bool:
    """Whether a path is a run directory or a dataset of ours: what `validate` checks."""
    if isinstance(path, str) and is_url(path) and not is_object_url(path):
        return False
    return is_run(location(path)) or holds_dataset(location(path))


def holds_dataset(path: Location) -> bool:
    """Whether a folder or file is a dataset of ours, damaged or not."""
    return format_of(path) is not None or is_ours(path)


def find_problems(folder: Location) -> Iterator[str]:
    """All problems, as they are found."""
    if not is_run(folder):
        yield from dataset_problems(folder)
        return
    of_rounds = sorted(files.list_folders(folder / "rounds"), key=str)
    datasets = [found for place in (folder, *of_rounds) for found in datasets_in(place)]
    if not datasets:
        yield f"{folder}: the run has no dataset yet"
        return
    formats = run_file_as_read(RunDir(folder)).get("settings", {}).get("format", ())
    for place in (folder, *of_rounds):
        yield from wrong_formats(RunDir(place), formats)
    for dataset in datasets:
        yield from dataset_problems(dataset)


def datasets_in(place: Location) -> list[Location]:
    """The datasets of a run, or of one of its rounds."""
    return [
        inner
        for inner in files.list_folders(place)
        if inner.name.startswith("dataset") and holds_dataset(inner)
    ]


def wrong_formats(place: RunDir, formats: Sequence[str]) -> Iterator[str]:
    """Datasets that are not there, or of another format than the settings ask for in that place."""
    for name, folder in place.dataset_folders(formats).items():
        found = format_of(folder)
        if not holds_dataset(folder):
            yield f"{folder}: is not there, the settings ask for {name}; the next merge writes it"
        elif found is not None and found != name:
            yield f"{folder}: holds {found}, the settings ask for {name}; the next merge writes it"


def is_run(folder: Location) -> bool:
    """Whether a folder is a run directory."""
    run_dir = RunDir(folder)
    return files.exists(run_dir.run_json) or files.exists(run_dir.manifest)


def format_of(path: Location) -> str | None:
    """A dataset's format, as its record, columns or files say; None when it is none of ours."""
    stats = read_record(path)
    if stats is not None and stats.get("format") in FORMATS:
        return str(stats["format"])
    for part in parquet_parts(path):
        columns = set(column_names(part))
        if found := next((name for name, own in OWN_COLUMNS.items() if own <= columns), None):
            return found
    parts = jsonl_parts(path)
    if files.exists(path / "dataset_info.json"):
        return "llama_factory_jsonl" if parts else None
    first = next(filter(None, map(first_row, parts)), None)
    return "ms_swift_jsonl" if first is not None and "rejected_response" in first else None


def parquet_parts(path: Location) -> list[Location]:
    """The parquet files of a dataset that are there; of a single file, that one."""
    if path.suffix == ".parquet" and files.exists(path):
        return [path]
    parts = [part for part in parts_of(path) if part.suffix == ".parquet"]
    return [part for part in parts if files.exists(part)]


def jsonl_parts(path: Location) -> list[Location]:
    """The files of JSON lines of a dataset that are there."""
    parts = [part for part in parts_of(path) if part.suffix == ".jsonl"]
    return [part for part in parts if split_named(part.name) in SPLITS and files.exists(part)]


def column_names(part: Location) -> list[str]:
    """The columns of a parquet file; none when it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with files.open_file(part) as file:
            return list(pyarrow.parquet.read_schema(file).names)
    except (pyarrow.ArrowException, OSError, ValueError):
        return []


def dataset_problems(folder: Location) -> Iterator[str]:
    """The problems of one dataset: files, schema, every row, and the number of rows."""
    name = format_of(folder)
    if name is None:  # too damaged to tell
        yield from file_problems(folder)
        return
    rows = parquet_rows if issubclass(FORMATS[name], ParquetFiles) else jsonl_rows
    num_rows = 0
    for where, row in rows(folder, name):
        if isinstance(row, str):
            yield f"{where}: {row}"
            continue
        num_rows += 1
        yield from (f"{where}: {problem}" for problem in row_problems(row, folder, CHECKS[name]))
    yield from count_problems(folder, num_rows)
    yield from file_problems(folder)
    yield from foreign_rows(folder)


def foreign_rows(folder: Location) -> Iterator[str]:
    """Files of rows from elsewhere, and of other publications."""
    stats = read_record(folder)
    if stats is None:
        return
    left = left_behind(folder)
    known = {*recorded(stats), *(entry.name for entry in left)}
    for entry in files.list_files(folder):
        is_rows = entry.path.suffix in (".parquet", ".jsonl", ".arrow")
        if is_rows and entry.name not in known:
            yield f"{entry.path}: is not of this dataset; who reads all files there reads it, too"
    yield from other_publications(left)


def parquet_rows(folder: Location, name: str) -> Iterator[tuple[str, Row | str]]:
    """Every row of the parts, or a problem instead, each with its place."""
    import pyarrow
    import pyarrow.parquet

    for part in parquet_parts(folder):
        try:
            with files.open_file(part) as stream:
                file = pyarrow.parquet.ParquetFile(stream)
                yield from ((str(part), problem) for problem in schema_problems(file, name))
                for number, row in enumerate(rows_of(file)):
                    yield f"{part}, row {number}", row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            yield str(part), unreadable(error)


def jsonl_rows(folder: Location, _name: str) -> Iterator[tuple[str, Row | str]]:
    """Every row of the splits' files, or a problem instead, each with its place."""
    for path in jsonl_parts(folder):
        begins_with_image = True
        try:
            for number, row in enumerate(lines_of(path)):
                where = f"{path}, row {number}"
                if row is None:
                    yield where, "not a JSON object"
                    continue
                if number == 0:
                    begins_with_image = bool(row.get("images"))
                elif row.get("images") and not begins_with_image:
                    begins_with_image = True  # said once
                    yield where, LATE_IMAGES
                yield where, row
        except OSError as error:
            yield str(path), unreadable(error)


def schema_problems(file: Any, name: str) -> Iterator[str]:
    """Columns, types and the metadata by which images load as images."""
    expected, found = arrow_schema(FEATURES[name]), file.schema_arrow
    for field in expected:
        if field.name not in found.names:
            if field.name not in OPTIONAL_COLUMNS:
                yield f"column {field.name!r} is missing"
        elif found.field(field.name).type != field.type:
            yield f"column {field.name!r} is {found.field(field.name).type}, not {field.type}"
    if name == "trl":
        for reserved in sorted(RESERVED_TRL_COLUMNS & set(found.names)):
            yield f"column {reserved!r} makes TRL take the rows for another kind of data"
    metadata = json.loads((found.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    column = "image" if "image" in expected.names else "images"
    if "Image" not in json.dumps(features.get(column, {})):
        yield f"no Hugging Face metadata says that {column!r} holds images; they load as dicts"


def row_problems(row: Row, folder: Location, check: Check) -> Iterator[str]:
    """Problems of one row; a row of another shape than its schema's is one problem."""
    try:
        yield from check(row, folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield f"not of the expected shape: {type(error).__name__}: {error}"


def lines_of(path: Location) -> Iterator[Row | None]:
    """The JSON objects of a file's lines; None for a line that is none."""
    with files.open_file(path) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def first_row(path: Location) -> Row | None:
    """The object of a file's first line; None when it is none, or cannot be read."""
    try:
        return next(lines_of(path), None)
    except OSError:
        return None


def count_problems(folder: Location, num_rows: int) -> Iterator[str]:
    """Whether the rows are as many as stats.json says, which is checked with the files."""
    stats = read_record(folder)
    expected = num_rows if stats is None else sum(stats["splits"].values())
    if expected != num_rows:
        yield f"{folder}: {num_rows} rows, stats.json says {expected}"
