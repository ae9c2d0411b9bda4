from pathlib import Path

import msgspec
import pytest

from stream_engine.config import InputConfig
from stream_engine.errors import ShardError, ShardReadError
from stream_engine.inputs.sources import input_fingerprint
from stream_engine.records import ShardInfo
from stream_engine.run_dir.manifest import InputInfo, Manifest, RowCounts, reading_settings
from stream_engine.run_dir.paths import RunDir
from stream_engine.store.locations import canonical_source
from tests.samples import make_row, write_jsonl


def was_read(manifest: Manifest, path: Path, config: InputConfig | None = None) -> bool:
    return manifest.is_read(str(path), input_fingerprint(str(path)), config)


def make_info(index: int, num_samples: int = 2) -> ShardInfo:
    keys = [f"{index * 100 + i:032x}" for i in range(num_samples)]
    return ShardInfo(
        index=index, num_samples=num_samples, num_bytes=1, sha256="0", keys=keys, ids=keys
    )


def input_info(source: str, **changes) -> InputInfo:
    info = InputInfo(source=source, fingerprint="f", settings="s", read=2, added=2, known=0)
    return msgspec.structs.replace(info, **changes)


def test_shards_come_back_in_order(run_dir: RunDir):
    manifest = Manifest.load(run_dir)
    infos = [make_info(i) for i in range(5)]
    for info in infos:
        manifest.append_shard(info)
    for loaded in (manifest, Manifest.load(run_dir)):
        assert len(loaded.shards) == 5
        assert list(loaded.shards) == infos
        assert loaded.shards[3] == infos[3]
        assert loaded.shards[-1] == infos[-1]
        assert loaded.shards[1:3] == infos[1:3]
    with pytest.raises(IndexError):
        manifest.shards[5]


def test_a_run_without_a_manifest_has_no_shards(run_dir: RunDir):
    assert list(Manifest.load(run_dir).shards) == []
    assert not run_dir.root.exists()


@pytest.mark.parametrize("damage", [b"", b'{"kind"', bytes(50) + b"\n"])
def test_a_damaged_last_line_is_an_error_that_says_what_helps(run_dir: RunDir, damage: bytes):
    """Lines are added by replacing the whole file: no kill and no power cut leaves half of one."""
    manifest = Manifest.load(run_dir)
    manifest.append_shard(make_info(0))
    manifest.append_shard(make_info(1))
    whole = run_dir.manifest.read_bytes()
    run_dir.manifest.write_bytes(whole[:-1] if not damage else whole + damage)
    with pytest.raises(ShardReadError, match=r"line [23] is damaged\. Put a copy"):
        Manifest.load(run_dir)


def test_a_full_part_is_followed_by_the_next(run_dir: RunDir, monkeypatch):
    monkeypatch.setattr("stream_engine.run_dir.manifest.PART_BYTES", 1000)
    manifest, reader = Manifest.load(run_dir), Manifest.load(run_dir)
    infos = [make_info(i, num_samples=5) for i in range(20)]
    for i, info in enumerate(infos):
        manifest.append_shard(info, source="/a")
        assert len(reader.refresh().shards) == i + 1
    manifest.append_input(input_info("/a"))
    sizes = [path.stat().st_size for path in run_dir.shards_dir.glob("manifest*.jsonl")]
    assert len(sizes) > 5 and max(sizes) <= 1000
    for loaded in (manifest, reader.refresh(), Manifest.load(run_dir)):
        assert list(loaded.shards) == infos
        assert [loaded.shards[i] for i in (0, 7, 19)] == [infos[i] for i in (0, 7, 19)]
        assert loaded.shards[4:9] == infos[4:9]
        assert list(loaded.inputs) == ["/a"]


def test_a_part_that_was_put_back_from_a_copy_is_read_anew(run_dir: RunDir):
    manifest = Manifest.load(run_dir)
    manifest.append_shard(make_info(0))
    copy = run_dir.manifest.read_bytes()
    manifest.append_shard(make_info(1))
    reader = Manifest.load(run_dir)
    run_dir.manifest.write_bytes(copy)
    assert list(reader.refresh().shards) == [make_info(0)]
    run_dir.manifest.unlink()
    assert list(reader.refresh().shards) == []


def test_a_damaged_line_in_the_middle_is_an_error(run_dir: RunDir):
    manifest = Manifest.load(run_dir)
    for i in range(3):
        manifest.append_shard(make_info(i))
    lines = run_dir.manifest.read_bytes().splitlines(keepends=True)
    run_dir.manifest.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(ShardReadError, match="line 2"):
        Manifest.load(run_dir)


def test_two_writers_cannot_overwrite_each_other(run_dir: RunDir):
    first, second = Manifest.load(run_dir), Manifest.load(run_dir)
    first.append_shard(make_info(0))
    with pytest.raises(ShardError, match="another process"):
        second.append_shard(make_info(0))
    assert list(Manifest.load(run_dir).shards) == [make_info(0)]


def test_the_latest_line_of_an_input_counts_and_earlier_states_are_read_too(run_dir: RunDir):
    manifest = Manifest.load(run_dir)
    manifest.append_input(input_info("/a"))
    manifest.append_input(input_info("/a", fingerprint="g"))
    loaded = Manifest.load(run_dir)
    assert loaded.inputs == {"/a": input_info("/a", fingerprint="g")}
    assert loaded.is_read("/a", "g")
    assert loaded.is_read("/a", "f") and not loaded.is_read("/a", "h")


def test_an_input_that_is_forgotten_keeps_its_counts_and_is_not_read(run_dir: RunDir):
    manifest = Manifest.load(run_dir)
    config = InputConfig()
    known = input_info("/a", rejected={"missing_image_file": 1}, settings=reading_settings(config))
    manifest.append_input(known)
    assert manifest.was_read_since(0, "/a", config)
    manifest.forget_input("/a")
    for loaded in (manifest, Manifest.load(run_dir)):
        assert not loaded.is_read("/a", known.fingerprint)
        assert not loaded.was_read_since(0, "/a", config)
        assert loaded.inputs["/a"].rejected == known.rejected
    manifest.append_input(known)
    assert manifest.is_read("/a", known.fingerprint)


def test_an_earlier_state_with_unreadable_files_is_not_read(run_dir: RunDir):
    manifest = Manifest.load(run_dir)
    cut = input_info("/a", unreadable={"/a/b": RowCounts(read=1, rejected={"unreadable_file": 1})})
    manifest.append_input(cut)
    assert manifest.is_read("/a", cut.fingerprint)
    manifest.append_input(input_info("/a", fingerprint="g"))
    assert not manifest.is_read("/a", cut.fingerprint)


@pytest.mark.parametrize(
    ("read", "limit", "asked", "is_read"),
    [
        pytest.param(5, 5, 5, True, id="the-same"),
        pytest.param(5, 5, 3, True, id="less"),
        pytest.param(5, 5, 6, False, id="more"),
        pytest.param(5, 5, None, False, id="all"),
        pytest.param(4, 5, None, True, id="all-of-a-shorter-input"),
        pytest.param(9, None, 5, True, id="less-than-all"),
    ],
)
def test_an_input_is_read_when_an_earlier_limit_went_as_far(
    read: int, limit: int | None, asked: int | None, is_read: bool, run_dir: RunDir, tmp_path: Path
):
    path = write_jsonl(tmp_path / "a.jsonl", [make_row(0)])
    info = input_info(
        canonical_source(str(path)),
        fingerprint=input_fingerprint(str(path)),
        settings=reading_settings(InputConfig()),
        read=read,
        max_samples=limit,
    )
    manifest = Manifest.load(run_dir)
    manifest.append_input(info)
    assert was_read(manifest, path, InputConfig(max_samples=asked)) == is_read


def test_an_input_is_complete_until_it_or_its_settings_change(run_dir: RunDir, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [make_row(0)])
    config = InputConfig()
    info = input_info(
        canonical_source(str(path)),
        fingerprint=input_fingerprint(str(path)),
        settings=reading_settings(config),
    )
    manifest = Manifest.load(run_dir)
    assert not was_read(manifest, path)
    manifest.append_input(info)
    assert was_read(manifest, path, config)
    assert not manifest.is_read(
        str(path), input_fingerprint(str(path)), InputConfig(max_image_pixels=1)
    )
    assert manifest.is_read(
        str(path), input_fingerprint(str(path)), InputConfig(samples_per_shard=7)
    )
    write_jsonl(path, [make_row(0), make_row(1)])
    assert not was_read(manifest, path)


def test_unfinished_shards_are_those_since_the_inputs_last_line(run_dir: RunDir):
    manifest = Manifest.load(run_dir)
    manifest.append_shard(make_info(0), source="/a")
    manifest.append_input(input_info("/a"))
    manifest.append_shard(make_info(1), source="/a")
    manifest.append_shard(make_info(2), source="/b")
    for loaded in (manifest, Manifest.load(run_dir)):
        assert list(loaded.unfinished_shards("/a")) == [make_info(1)]
        assert list(loaded.unfinished_shards("/b")) == [make_info(2)]
        assert list(loaded.unfinished_shards("/c")) == []


def test_a_bit_that_changed_in_a_line_is_told(run_dir: RunDir):
    """A changed id or count was believed, and another dataset came of it without a word."""
    manifest = Manifest.load(run_dir)
    manifest.append_shard(make_info(0))
    manifest.append_shard(make_info(1))
    whole = run_dir.manifest.read_bytes()
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 1
        run_dir.manifest.write_bytes(changed)
        try:
            assert [*Manifest.load(run_dir).shards] == [make_info(0), make_info(1)], position
        except ShardReadError as error:
            assert "is damaged. Put a copy" in str(error)
