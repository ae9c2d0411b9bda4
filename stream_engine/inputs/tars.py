"""WebDataset tars as rows: `key.json` or `key.txt`, and the pictures beside it.

A member belongs to the text member whose name without its suffix is the longest beginning of its
own ("cat.v1.0.jpg" to "cat.v1.0.json"); without one, to WebDataset's key, the name up to its first
dot. Members of one key must follow each other, as WebDataset's own reader wants them. What holds in
a tar as a whole (keys that are scattered, pictures in another folder, a damaged header) is told
from the headers in a first pass, so that nothing is asked without a picture that is there.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, BinaryIO

from stream_engine.errors import RecordError
from stream_engine.inputs.cells import is_missing
from stream_engine.inputs.encodings import text_in_utf8
from stream_engine.inputs.json_files import parse_json
from stream_engine.inputs.layouts import CHAT_COLUMNS, PICTURE_COLUMNS, Row
from stream_engine.inputs.picture_values import is_encoded, pictures_in
from stream_engine.inputs.tar_members import CutError, Member, RestError, tar_members
from stream_engine.inputs.unread import Unread, Unreadable
from stream_engine.run_dir.shards import UNKNOWN_EXTENSION, image_extension

TEXT_SUFFIXES = ("json", "txt")

IMAGE_SUFFIXES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "avif", "img", "image"),
        *("heic", "heif", "svg", "psd", "ico", "tga", "pcx", "eps", "exr", "hdr", "dng", "jxl"),
    )
)
"""Members that are pictures; also those of formats that are refused, by name."""

NUMBER_BEHIND = re.compile(r"[-_ ]\d+$")
"""What tells the pictures of one sample apart where no dot does: a-0.jpg, a-1.jpg."""

Key = tuple[int, str]
"""The archive within the file, and the key within the archive."""


@dataclass
class TarScan:
    """What the headers of a tar tell."""

    key_of: Callable[[int, str], Key]
    """What tells a member's key from its archive and its name."""
    num_whole: int = 0
    """Samples that are there to their last member."""
    faults: dict[Key, RecordError] = field(default_factory=dict)
    stray: dict[Key, str] = field(default_factory=dict)
    """Keys without text and picture: members that belong to no sample."""
    cut: CutError | None = None

    @property
    def cuts_a_sample(self) -> bool:
        return self.cut is not None and not isinstance(self.cut, RestError)


def webdataset_rows(
    open_stream: Callable[[], BinaryIO], unread: Unread
) -> Iterator[tuple[int, Row | RecordError]]:
    """The samples of a tar; `open_stream` opens it at its start, once for each of two passes.

    Raises:
        Unreadable: for what is no tar, and behind the last whole sample of one that is cut.
    """
    with open_stream() as stream:
        scan = scan_tar(stream)
    with open_stream() as stream:
        position = 0
        files = files_of(stream, unread)
        for key, members in groupby(files, lambda file: scan.key_of(file.archive, file.name)):
            if key in scan.stray and key not in scan.faults:
                unread.note_left_out(scan.stray[key], next(members).name)
                continue
            if position == scan.num_whole:
                break
            row = scan.faults.get(key) or webdataset_row(key[1], members, stream, unread)
            yield position, row
            position += 1
    if scan.cut is not None:
        left_out = "; its last sample is left out" if scan.cuts_a_sample else ""
        raise Unreadable(f"{scan.cut}{left_out}") from scan.cut


def files_of(stream: BinaryIO, unread: Unread) -> Iterator[Member]:
    """The members that hold or name something; stops where the tar is cut."""
    try:
        for member in tar_members(stream):
            if member.is_side_file:
                unread.note_left_out("members that macOS adds", member.name)
            elif member.is_file or member.is_link:
                yield member
    except CutError:
        return


def scan_tar(stream: BinaryIO) -> TarScan:
    """Read the headers of a tar; its keys are in memory meanwhile."""
    texts: dict[Key, str] = {}
    pictures: set[Key] = set()
    headers: list[tuple[int, str | None]] = []  # archive and name; None: a damaged header
    cut: CutError | None = None
    try:
        for member in tar_members(stream):
            if member.header is None:
                headers.append((member.archive, None))
            elif (member.is_file or member.is_link) and not member.is_side_file:
                stem, suffix = split_suffix(member.name)
                if suffix in TEXT_SUFFIXES:
                    key = member.archive, stem
                    texts[key] = min(suffix, texts.get(key, suffix))  # json goes before txt
                elif suffix in IMAGE_SUFFIXES:
                    pictures.add((member.archive, stem))
                headers.append((member.archive, member.name))
    except CutError as error:
        cut = error
    scan = TarScan(key_finder(texts, pictures), cut=cut)
    note_groups(scan, headers)
    return scan


def key_finder(stems: Mapping[Key, str], pictures: Set[Key]) -> Callable[[int, str], Key]:
    """What tells a member's key, from the stems of all texts, with their suffixes, and pictures.

    A caption beside a sample ("a.caption.txt" beside "a.json") is no sample of its own; "a.1.json"
    is, where both have a picture of the same name.
    """
    texts = set()
    for stem, suffix in stems.items():
        above = stem[0], webdataset_key(stem[1])
        is_alike = suffix == stems.get(above) and {stem, above} <= pictures
        if above == stem or above not in stems or is_alike:
            texts.add(stem)

    def key_of(archive: int, name: str) -> Key:
        stem = name
        while True:
            stem, suffix = split_suffix(stem)
            if (archive, stem) in texts:
                return archive, stem
            if not suffix:
                return archive, webdataset_key(name)

    return key_of


def note_groups(scan: TarScan, headers: list[tuple[int, str | None]]) -> None:
    """Count the samples, and find what is wrong with some."""
    suffixes: dict[Key, set[str]] = {}
    groups: list[Key] = []
    after_damage = False
    for archive, name in headers:
        if name is None:
            fault = RecordError("damaged_header", "a header beside this sample is damaged")
            if groups:
                scan.faults.setdefault(groups[-1], fault)
            after_damage = True
            continue
        key = scan.key_of(archive, name)
        if not groups or key != groups[-1]:
            if key in suffixes:
                detail = f"members of {key[1]} do not follow each other"
                scan.faults[key] = RecordError("scattered_members", detail)
            groups.append(key)
        if after_damage:
            scan.faults.setdefault(key, RecordError("damaged_header", f"before {name}"))
            after_damage = False
        suffixes.setdefault(key, set()).add(split_suffix(name)[1])
    note_missing_halves(scan, suffixes)
    rows = [key for key in groups if key not in scan.stray or key in scan.faults]
    scan.num_whole = len(rows)
    if scan.cuts_a_sample and rows and rows[-1] == groups[-1]:
        scan.num_whole -= 1


def note_missing_halves(scan: TarScan, suffixes: dict[Key, set[str]]) -> None:
    """Find texts whose pictures have another key, by their folder or by WebDataset's rule, and
    members of no sample."""
    has_picture = {key: bool(found & IMAGE_SUFFIXES) for key, found in suffixes.items()}
    has_text = {key: bool(found.intersection(TEXT_SUFFIXES)) for key, found in suffixes.items()}
    alone = {
        (key[0], plain_name(key[1])): key[1]
        for key in suffixes
        if has_picture[key] and not has_text[key]
    }
    numbered = {
        (key[0], NUMBER_BEHIND.sub("", key[1])): key[1]
        for key in suffixes
        if has_picture[key] and not has_text[key] and NUMBER_BEHIND.search(key[1])
    }
    for key, found in suffixes.items():
        if not has_text[key] and not has_picture[key]:
            scan.stray[key] = f"members .{min(found)} without a text"
        if not has_text[key] or has_picture[key]:
            continue
        elsewhere = alone.get((key[0], plain_name(key[1])))
        of_first_dot = (key[0], webdataset_key(key[1]))
        if has_picture.get(of_first_dot) and not has_text[of_first_dot]:
            scan.faults[key] = RecordError(
                "unread_member",
                f"its picture {of_first_dot[1]}.{min(suffixes[of_first_dot] & IMAGE_SUFFIXES)} has "
                f"another key; name the text {of_first_dot[1]}.json or .txt",
            )
        elif key in numbered:
            scan.faults[key] = RecordError(
                "unread_member",
                f"its pictures have keys of their own, {numbered[key]}.*; put a dot before the "
                f"number: {key[1]}.0.jpg",
            )
        elif elsewhere is not None:
            scan.faults[key] = RecordError(
                "unread_member",
                f"its picture has another key, {elsewhere}.*: folders, capitals and accents are "
                "parts of a key; give both one name, in one folder",
            )


def plain_name(key: str) -> str:
    """A key without its folder, capitals and ways to write accents: what may be meant alike."""
    return unicodedata.normalize("NFC", posixpath.basename(key)).casefold().strip()


def webdataset_row(
    key: str, members: Iterator[Member], stream: BinaryIO, unread: Unread
) -> Row | RecordError:
    """One sample of a tar as a row; pictures in natural order of their names.

    Of a member that stands twice the last one is taken. A member that may be the sample's picture
    and is not read rejects it.
    """
    content: dict[str, bytes] = {}
    links: list[str] = []
    for member in members:
        assert member.header is not None, member.name
        name = member.name[len(key) + 1 :]
        name = name.lower() if name.lower() in TEXT_SUFFIXES else name
        if member.is_link:
            links.append(f"{member.name} -> {member.header.linkname}")
            continue
        if name in content:
            unread.note_left_out("members that stand twice, but for the last one,", member.name)
        stream.seek(member.header.offset_data)
        content[name] = stream.read(member.header.size)
    if links:
        return RecordError("unread_member", f"{links[0]} is a link; store the file itself")
    row = text_row(key, content, unread)
    if isinstance(row, RecordError):
        return row
    images = [name for name in content if is_picture(name, content[name])]
    others = [name for name in content if name not in images and name not in TEXT_SUFFIXES]
    for name in others:
        unread.note_left_out(f"members .{split_suffix(name)[1] or name}", f"{key}.{name}")
    if empty := next((name for name in images if not content[name]), None):
        return RecordError("undecodable_image", f"{key}.{empty} is empty")
    if images:
        pictures = {
            f"{key}.{name}": {"bytes": content[name], "path": f"{key}.{name}"}
            for name in sorted(images, key=natural_order)
        }
        return with_members(row, pictures, key, unread)
    if others and not any(row.get(name) for name in ("image", "images", "image_path")):
        return RecordError(
            "unread_member",
            f"no member is a picture of a known format; {key}.{others[0]} was not read",
        )
    return row


def with_members(
    row: Row, pictures: dict[str, dict[str, Any]], key: str, unread: Unread
) -> Row | RecordError:
    """A sample's row with the pictures beside it, by their names. Its json may hold them once more;
    where it names members, these are the pictures, in its order.

    One that it names or holds and that is no member would be lost.
    """
    told = [pictures_in(row.get(name)) for name in PICTURE_COLUMNS]
    if (most := max(map(len, told))) > len(pictures):
        detail = f"the json tells of {most} pictures, the tar holds {len(pictures)}"
        return RecordError("unread_member", detail)
    held = [value for values in told for value in values if is_encoded(value)]
    named = members_named(max(told, key=len), pictures, key)
    for name in pictures.keys() - set(named):
        unread.note_left_out("pictures that their json does not name", name)
    return row | {"images": [pictures[name] for name in named], "image": held}


def members_named(values: list[Any], pictures: Collection[str], key: str) -> list[str]:
    """The members that a json's list of pictures names, in its order, each once; all of them where
    it names another or none."""
    folder = key.rpartition("/")[0]
    named = []
    for value in map(str, values):
        names = (value, f"{key}.{value}", posixpath.join(folder, posixpath.basename(value)))
        named += [name for name in names if name in pictures][:1]
    is_whole = len(set(named)) == len(named) == len(values) > 0
    return named if is_whole else list(pictures)


def text_row(key: str, content: dict[str, bytes], unread: Unread) -> Row | RecordError:
    """The columns of a sample's json, with its txt as the question where that has none."""
    if not content.keys() & set(TEXT_SUFFIXES):
        members = ", ".join(f"{key}.{name}" for name in content)
        return RecordError(
            "missing_question", f"a question is in {key}.json or {key}.txt; there is {members}"
        )
    row = parse_json(content["json"].removeprefix(b"\xef\xbb\xbf")) if "json" in content else {}
    if isinstance(row, RecordError):
        return row
    if "txt" in content:
        if all(is_missing(row.get(name)) for name in ("question", *CHAT_COLUMNS)):
            return row | {"question": text_in_utf8(content["txt"])}
        unread.note_left_out("members .txt beside a question in .json", f"{key}.txt")
    return row


def is_picture(name: str, data: bytes) -> bool:
    """Whether a member is one: by its suffix, else by how it begins."""
    suffix = split_suffix(f".{name}")[1]
    if suffix in TEXT_SUFFIXES:
        return False
    return suffix in IMAGE_SUFFIXES or image_extension(data) != UNKNOWN_EXTENSION


def split_suffix(name: str) -> tuple[str, str]:
    """A member's name without its last suffix, and that in lower case without its dot."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if dot else (name, "")


def webdataset_key(name: str) -> str:
    """WebDataset's key of a member: its name up to the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which 2.jpg comes before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
