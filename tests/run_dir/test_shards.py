import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import pytest
from webdataset import WebDataset

from stream_engine.errors import ShardReadError
from stream_engine.records import Sample, ShardInfo
from stream_engine.run_dir.shards import image_extension, read_shard, write_shard
from stream_engine.store import files
from tests.samples import make_sample, picture


@pytest.fixture
def samples() -> list[Sample]:
    return [make_sample(i, num_images=i % 3) for i in range(6)]


@pytest.fixture
def shard(tmp_path: Path, samples: list[Sample]) -> tuple[Path, ShardInfo]:
    path = tmp_path / "000000.tar"
    return path, write_shard(path, 0, samples)


def test_samples_come_back_as_they_were(shard, samples):
    path, info = shard
    assert list(read_shard(path, info)) == samples
    assert list(read_shard(path, info, verify=False)) == samples
    assert info.num_samples == 6
    assert info.num_bytes == path.stat().st_size
    assert info.keys == [sample.key for sample in samples]
    assert info.ids == [sample.idx for sample in samples]


def test_equal_samples_make_equal_bytes_in_any_process(shard, samples, tmp_path: Path):
    path, _ = shard
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from stream_engine.run_dir.shards import write_shard\n"
        "from tests.samples import make_sample\n"
        "write_shard(Path(sys.argv[1]), 0, [make_sample(i, num_images=i % 3) for i in range(6)])\n"
    )
    again = tmp_path / "again.tar"
    environment = {**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "USER": "other"}
    subprocess.run(
        [sys.executable, "-c", f"import os; os.umask(0o077)\n{script}", str(again)],
        check=True,
        env=environment,
    )
    assert again.read_bytes() == path.read_bytes()


def test_members_are_those_of_the_layout(shard, samples):
    path, _ = shard
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    key = samples[2].key
    assert {member.name for member in members if member.name.startswith(key)} == {
        f"{key}.json",
        f"{key}.0.png",
        f"{key}.1.png",
    }
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_webdataset_reads_our_shards(shard, samples):
    path, _ = shard
    read = list(WebDataset(str(path), shardshuffle=False))
    assert [item["__key__"] for item in read] == [sample.key for sample in samples]
    assert read[1]["0.png"] == samples[1].images[0].data


def test_a_shard_is_written_one_sample_at_a_time(tmp_path: Path):
    """The first sample is in the file before the last one is asked for."""
    sizes = []

    def stream():
        for i in range(40):
            (temporary,) = tmp_path.glob(".*.tmp")
            sizes.append(temporary.stat().st_size)
            sample = make_sample(i)
            yield msgspec.structs.replace(sample, question="long " * 4000)

    write_shard(tmp_path / "000000.tar", 0, stream())
    assert sizes[-1] > 30 * 20_000


@pytest.mark.parametrize("member", range(1, 12))
def test_a_tar_cut_at_a_members_boundary_is_refused(shard, member: int):
    path, info = shard
    with tarfile.open(path) as tar:
        end = tar.getmembers()[member].offset
    os.truncate(path, end)
    for verify in (True, False):
        with pytest.raises(ShardReadError, match=r"000000\.tar"):
            list(read_shard(path, info, verify=verify))


def test_a_tar_cut_at_a_samples_boundary_names_the_first_missing_key(shard):
    path, info = shard
    with tarfile.open(path) as tar:
        end = next(m.offset for m in tar.getmembers() if m.name.startswith(info.keys[4]))
    os.truncate(path, end)
    with pytest.raises(ShardReadError, match=f"4 samples.*6.*{info.keys[4]}"):
        list(read_shard(path, info))


def test_a_flipped_bit_in_an_image_names_its_sample(shard, samples):
    path, info = shard
    data = bytearray(path.read_bytes())
    position = data.index(samples[4].images[0].data) + 60
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardReadError) as caught:
        list(read_shard(path, info))
    assert samples[4].key in caught.value.member
    assert str(path) in str(caught.value)


def test_no_sample_of_a_changed_tar_is_yielded(shard):
    path, info = shard
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardReadError):
        next(read_shard(path, info))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"no tar " * 1000), id="garbage"),
        pytest.param(lambda path: os.truncate(path, path.stat().st_size - 700), id="torn"),
        pytest.param(lambda path: os.truncate(path, 700), id="torn-in-first-member"),
    ],
)
def test_damaged_tars_raise_and_name_the_file(shard, damage):
    path, info = shard
    damage(path)
    with pytest.raises(ShardReadError, match=r"000000\.tar"):
        list(read_shard(path, info))


def rewrite(path: Path, change) -> None:
    """Write a tar again with changed members (name -> content)."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    with tarfile.open(path, "w") as tar:
        for name, content in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_an_undecodable_member_is_named_even_without_the_checksum(shard):
    path, info = shard
    name = f"{info.keys[3]}.json"
    rewrite(path, lambda members: {**members, name: b"{broken"})
    with pytest.raises(ShardReadError) as caught:
        list(read_shard(path, info, verify=False))
    assert caught.value.member == name


def test_a_missing_image_member_is_named(shard):
    path, info = shard
    name = f"{info.keys[1]}.0.png"
    rewrite(path, lambda members: {k: v for k, v in members.items() if k != name})
    with pytest.raises(ShardReadError) as caught:
        list(read_shard(path, info, verify=False))
    assert caught.value.member == f"{info.keys[1]}.0.*"


def test_samples_in_another_order_are_refused(tmp_path: Path, samples):
    path = tmp_path / "000000.tar"
    info = write_shard(path, 0, samples)
    write_shard(path, 0, reversed(samples), over=files.version_of(path))
    with pytest.raises(ShardReadError, match="unexpected sample"):
        list(read_shard(path, info, verify=False))


@pytest.mark.parametrize(
    ("format", "extension"),
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")],
)
def test_extension_is_told_from_the_bytes(format: str, extension: str):
    assert image_extension(picture(1, format)) == extension
    assert image_extension(b"anything else") == "img"
