"""Parquet parts, written as a stream, that carry Hugging Face's feature metadata.

Knows nothing of samples or trainers: rows are dicts of columns, which `pack_rows` makes a batch of
in any process and `ParquetParts` takes in the one that writes. The schema is always given, since
a column whose values are all null would have another type in each part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import numpy
    import pyarrow
    import pyarrow.parquet

ROW_GROUP_BYTES = 16_000_000  # unencoded; what a reader must hold to get at one row
FOOTER_BYTES = 16_000  # left free in a part for its footer: schema and features,
GROUP_FOOTER_BYTES = 4_000  # and the columns of each row group
ROWS_PER_BATCH = 16  # that are read at once, or wait to be written
NUMBER_BYTES = 8

STRING = {"dtype": "string", "_type": "Value"}
FLOAT = {"dtype": "float64", "_type": "Value"}
INT = {"dtype": "int64", "_type": "Value"}
BOOL = {"dtype": "bool", "_type": "Value"}
IMAGE = {"_type": "Image"}


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file of a dataset."""

    name: str
    rows: int
    bytes: int
    origin: str = ""
    """Hash of what all rows up to its last, and to the end of that one's shard, were made from."""


class ParquetParts:
    """Writes rows to `{split}-00000-of-000NN.parquet`, holding one row group at a time.

    A part is at most `max_part_bytes` long, unless one row alone is longer. Columns are
    dictionary-encoded up to a whole row group, so that an image that several rows share is stored
    once.
    """

    def __init__(
        self, folder: Path, schema: pyarrow.Schema, *, max_part_bytes: int, split: str = "train"
    ) -> None:
        self.folder = folder
        self.split = split
        self.schema = schema
        self.max_part_bytes = max_part_bytes
        self.row_group_bytes = min(ROW_GROUP_BYTES, max(1, max_part_bytes // 2))
        self.batches: list[tuple[pyarrow.RecordBatch, str]] = []
        self.unpacked: list[dict[str, Any]] = []
        self.num_rows = 0
        self.num_bytes = 0
        self.part_rows: list[int] = []
        self.part_origins: list[str] = []
        self.part_groups = 0
        self.num_there = 0
        self._writer: pyarrow.parquet.ParquetWriter | None = None
        self._sink: pyarrow.NativeFile | None = None

    def begin_with(self, parts: Sequence[Part]) -> None:
        """Go on after these parts, whose files are in place (`unfinished`).

        Their rows are left out where they are given again; `pass_over` those that are not.
        """
        self.part_rows = [part.rows for part in parts]
        self.part_origins = [part.origin for part in parts]
        self.num_there = sum(self.part_rows)

    def pass_over(self, num_rows: int) -> None:
        """Rows that come next are there, and are not given."""
        self.num_there -= num_rows

    def write(self, row: dict[str, Any]) -> None:
        """Take a row by itself."""
        self.unpacked.append(row)
        if len(self.unpacked) == ROWS_PER_BATCH:
            self._pack()

    def _pack(self) -> None:
        unpacked, self.unpacked = self.unpacked, []
        if unpacked:
            self.take(pack_rows(unpacked, self.schema))

    def take(self, rows: PackedRows, origin: str = "") -> None:
        """Take rows of one origin; writes a row group whenever enough of them are there."""
        import pyarrow

        self._pack()
        batch = pyarrow.ipc.read_record_batch(pyarrow.py_buffer(rows.batch), self.schema)
        first = min(self.num_there, len(rows.sizes))
        self.num_there -= first
        for row, num_bytes in enumerate(rows.sizes[first:], first):
            if self.num_rows and self.num_bytes + num_bytes > self.row_group_bytes:
                self._keep(batch.slice(first, row - first), origin)
                self._write_row_group()
                first = row
            self.num_rows += 1
            self.num_bytes += num_bytes
        self._keep(batch.slice(first), origin)

    def _keep(self, batch: pyarrow.RecordBatch, origin: str) -> None:
        if batch.num_rows:
            self.batches.append((batch, origin))

    def origins(self) -> set[str]:
        """Those that are, or may come to be, of a part's last row."""
        return {*self.part_origins, *(origin for _, origin in self.batches)}

    def close(self) -> list[Part]:
        """Finish the last part and give all parts their names.

        Without any row there is one part without rows, so that the dataset still has its columns.
        """
        self._pack()
        if self.num_rows:
            self._write_row_group()
        elif not self.part_rows:
            self._open_part()
        self._close_part()
        total = len(self.part_rows)
        parts = []
        for number, (rows, origin) in enumerate(zip(self.part_rows, self.part_origins)):
            path = self.folder / f"{self.split}-{number:05d}-of-{total:05d}.parquet"
            self.unfinished(number).rename(path)
            num_bytes = path.stat().st_size
            parts.append(Part(name=path.name, rows=rows, bytes=num_bytes, origin=origin))
        return parts

    def unfinished(self, number: int) -> Path:
        """Where a part lies until all are there."""
        return self.folder / f"{self.split}-{number:05d}.unfinished"

    def _write_row_group(self) -> None:
        import pyarrow

        if self._sink is not None:
            footer = FOOTER_BYTES + GROUP_FOOTER_BYTES * (self.part_groups + 1)
            if self._sink.tell() + self.num_bytes + footer > self.max_part_bytes:
                self._close_part()
        if self._writer is None:
            self._open_part()
        assert self._writer is not None
        batches = [batch for batch, _ in self.batches]
        table = pyarrow.Table.from_batches(batches, schema=self.schema)
        self._writer.write_table(table.combine_chunks(), row_group_size=self.num_rows)
        self.part_rows[-1] += self.num_rows
        self.part_origins[-1] = self.batches[-1][1]
        self.part_groups += 1
        self.batches, self.num_rows, self.num_bytes = [], 0, 0

    def _open_part(self) -> None:
        import pyarrow
        import pyarrow.parquet

        self._sink = pyarrow.OSFile(str(self.unfinished(len(self.part_rows))), "wb")
        self._writer = pyarrow.parquet.ParquetWriter(
            self._sink,
            self.schema,
            compression="snappy",
            dictionary_pagesize_limit=self.row_group_bytes,
            write_statistics=False,
        )
        self.part_rows.append(0)
        self.part_origins.append("")
        self.part_groups = 0

    def _close_part(self) -> None:
        if self._writer is None or self._sink is None:
            return
        self._writer.close()
        self._sink.close()
        self._writer = self._sink = None


def rows_of(file: pyarrow.parquet.ParquetFile) -> Iterator[dict[str, Any]]:
    """The rows of an open file, a few at a time.

    Without rows there is no row group, which older pyarrow cannot iterate over.
    """
    batches = file.iter_batches(ROWS_PER_BATCH) if file.num_row_groups else ()
    return (row for batch in batches for row in batch.to_pylist())


def write_empty(path: Path, schema: pyarrow.Schema) -> None:
    """A parquet file without rows. It has no row group either: datasets fails on an empty one."""
    import pyarrow.parquet

    pyarrow.parquet.ParquetWriter(path, schema).close()


def arrow_schema(features: Mapping[str, Any]) -> pyarrow.Schema:
    """Hugging Face features as an arrow schema that carries them.

    The same as `datasets.Features(...).arrow_schema`, without importing datasets.
    """
    import pyarrow

    schema = pyarrow.schema([(name, arrow_type(feature)) for name, feature in features.items()])
    metadata = msgspec.json.encode({"info": {"features": dict(features)}})
    return schema.with_metadata({"huggingface": metadata})


def arrow_type(feature: Any) -> pyarrow.DataType:
    """The arrow type of one Hugging Face feature: a list, a struct, Image or Value."""
    import pyarrow

    if isinstance(feature, list):
        return pyarrow.list_(arrow_type(feature[0]))
    if feature == IMAGE:
        return pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    if feature.get("_type") == "Value":
        return pyarrow.type_for_alias(feature["dtype"])
    return pyarrow.struct([(name, arrow_type(value)) for name, value in feature.items()])


class PackedRows(msgspec.Struct, frozen=True):
    """Rows as one batch, and about how many bytes each takes unencoded."""

    batch: bytes
    sizes: list[int]


def pack_rows(rows: list[dict[str, Any]], schema: pyarrow.Schema) -> PackedRows:
    """Rows, each a dict of columns, as a batch of that schema."""
    import pyarrow

    batch = pyarrow.RecordBatch.from_pylist(rows, schema=schema)
    sizes = total_of([sizes_of(column) for column in batch.columns])
    return PackedRows(batch.serialize().to_pybytes(), sizes.tolist())


def total_of(sizes: list[numpy.ndarray]) -> numpy.ndarray:
    """The sums, value by value."""
    import numpy

    return numpy.sum(sizes, axis=0)


def sizes_of(values: pyarrow.Array) -> numpy.ndarray:
    """About how many bytes each value takes: those of texts and pictures, and 8 for what is none or
    a number."""
    import numpy
    import pyarrow
    import pyarrow.compute

    kind = values.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind):
        sizes = pyarrow.compute.binary_length(values).fill_null(NUMBER_BYTES).to_numpy()
    elif pyarrow.types.is_struct(kind):
        sizes = total_of([sizes_of(values.field(i)) for i in range(kind.num_fields)])
    elif pyarrow.types.is_list(kind):
        up_to = numpy.concatenate([[0], numpy.cumsum(sizes_of(values.values))])
        ends = values.offsets.to_numpy()
        sizes = up_to[ends[1:]] - up_to[ends[:-1]]
    else:
        return numpy.full(len(values), NUMBER_BYTES)
    return numpy.where(values.is_null().to_numpy(zero_copy_only=False), NUMBER_BYTES, sizes)
