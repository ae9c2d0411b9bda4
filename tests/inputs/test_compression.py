"""Compressed files: told by their content, read through padding, and up to a damaged place."""

import bz2
import gzip
import io
import lzma
import random
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from stream_engine.inputs.compression import decompressed
from stream_engine.inputs.unread import Unreadable
from tests.inputs.formats import read, write_webdataset
from tests.samples import make_row

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
PYTHONS = [".gz", ".bz2", ".xz"]
LINES = b'{"id": 1, "question": "?"}\n{"id": 2, "question": "?"}\n'


def two_tars(folder: Path) -> list[bytes]:
    return [write_webdataset(folder / "one.tar", [make_row(i)]).read_bytes() for i in (0, 1)]


@pytest.mark.parametrize("suffix", PACK)
def test_the_content_tells_whether_a_file_is_compressed(tmp_path: Path, suffix: str):
    """A download may unpack a file and keep its name, or the other way around."""
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(PACK[suffix](LINES))
    assert len(read(packed)) == 2
    if suffix != ".zst":
        plain = tmp_path / f"plain.jsonl{suffix}"
        plain.write_bytes(LINES)
        assert len(read(plain)) == 2


@pytest.mark.parametrize("name", ["a.tgz", "a.tbz2", "a.txz", "a.tzst"])
def test_short_suffixes_of_compressed_tars_are_known(tmp_path: Path, name: str):
    codec = {"a.tgz": ".gz", "a.tbz2": ".bz2", "a.txz": ".xz", "a.tzst": ".zst"}[name]
    (tmp_path / name).write_bytes(PACK[codec](two_tars(tmp_path)[0]))
    assert [sample.idx for sample in read(tmp_path / name)] == ["0"]


@pytest.mark.parametrize("suffix", PYTHONS)
def test_zeros_between_and_behind_members_are_padding(tmp_path: Path, suffix: str):
    packed = [PACK[suffix](content) + bytes(512) for content in two_tars(tmp_path)]
    path = tmp_path / f"all.tar{suffix}"
    path.write_bytes(b"".join(packed))
    assert [sample.idx for sample in read(path)] == ["0", "1"]


@pytest.mark.parametrize("suffix", PYTHONS)
@pytest.mark.parametrize("end", ["cut", "other"])
def test_what_stands_before_a_damaged_member_is_read(tmp_path: Path, suffix: str, end: str):
    """A second member that cannot be read took the whole file with it, or was lost in silence."""
    first, second = (PACK[suffix](content) for content in two_tars(tmp_path))
    path = tmp_path / f"all.tar{suffix}"
    path.write_bytes(first + (second[:9] if end == "cut" else b"something else"))
    sample, failure = read(path)
    assert (sample.idx, failure.reason, failure.row) == ("0", "unreadable_file", 1)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_every_line_before_a_cut_is_read(tmp_path: Path, codec: str):
    """Those of the last quarter MiB before the damaged place were lost."""
    noise = random.Random(0).randbytes(300_000).hex()
    lines = "".join(
        f"{number} {noise[60 * number : 60 * (number + 1)]}\n" for number in range(9999)
    )
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, codec) as stream:
        stream.write(lines.encode())
    whole = packed.getvalue().to_pybytes()
    half = whole[: len(whole) // 2]
    with decompressed(io.BytesIO(half), f"cut.{codec}") as stream, pytest.raises(Unreadable):
        found = []
        found.extend(stream)
    raw, num_bytes = pa.CompressedInputStream(io.BytesIO(half), codec), 0
    with suppress(OSError):
        while raw.read(1):
            num_bytes += 1
    assert len(found) == lines[:num_bytes].count("\n") > 1000
