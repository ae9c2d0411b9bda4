"""Tars that are read and written block by block are those of webdataset, byte for byte."""

from __future__ import annotations

import io

import pytest
from webdataset import TarWriter

from stream_engine.run_dir.plain_tar import PlainTarWriter, UnusualTar, plain_samples
from stream_engine.run_dir.shards import general_samples

SAMPLES = [
    (f"{number:032x}", {"json": b"{}" * number, "0.png": bytes(size), "10.jpg": b"x", "2.jpg": b""})
    for number, size in enumerate((0, 1, 511, 512, 513, 10_240, 70_000))
]


def webdatasets(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    file = io.BytesIO()
    fixed = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "compress": False}
    with TarWriter(file, encoder=False, **fixed) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    return file.getvalue()


def ours(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    file = io.BytesIO()
    writer = PlainTarWriter(file)
    for key, members in samples:
        writer.write(key, members)
    writer.close()
    return file.getvalue()


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param([], id="no sample"),
        pytest.param(SAMPLES, id="sizes around a block"),
        pytest.param([("k" * 99, {"json": b"1"})], id="a name too long for a header"),
        pytest.param([("ключ", {"json": b"1"})], id="a name beyond ASCII"),
        *(pytest.param(SAMPLES[:count], id=f"{count} samples") for count in range(1, 7)),
    ],
)
def test_a_tar_is_the_one_that_webdataset_writes(
    samples: list[tuple[str, dict[str, bytes]]],
) -> None:
    assert ours(samples) == webdatasets(samples)


def test_a_tar_is_read_as_webdataset_reads_it() -> None:
    content = ours(SAMPLES)
    read = list(plain_samples(io.BytesIO(content)))
    assert read == [{"__key__": key, **members} for key, members in SAMPLES]
    general = [
        {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
        for sample in general_samples("a.tar", io.BytesIO(content))  # type: ignore[arg-type]
    ]
    assert read == general


@pytest.mark.parametrize("samples", [[("k" * 99, {"json": b"1"})], [("ключ", {"json": b"1"})]])
def test_what_is_not_plain_is_left_to_others(samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with pytest.raises(UnusualTar):
        list(plain_samples(io.BytesIO(webdatasets(samples))))


def test_a_tar_that_is_cut_is_left_to_others() -> None:
    content = ours(SAMPLES)
    with pytest.raises(UnusualTar):
        list(plain_samples(io.BytesIO(content[:3000])))
