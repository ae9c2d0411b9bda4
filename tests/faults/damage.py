"""Bytes of a finished run change: that is named or mended, and no dataset is silently another.

After the damage come `validate`, `status --check`, a command that builds on what is there, and both
looks again. Either all is as it would have been without the damage, or one of these names the file
(or its shard) or refuses.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.hook import kind_of
from tests.faults.scenes import Scene, differences, facts
from tests.faults.trial import Ended, run
from tests.faults.verdicts import Verdict, detail_of, faults_of_ends

if TYPE_CHECKING:
    from tests.faults.campaign import Campaign

ZEROS = 512
STATES = (("run", "export"), ("run", "append"), ("shard", "work"))
NEXT = ("run", "merge", "append", "retry-failed", "export", "overwrite")
WITHOUT_MEANING = ("logs", "report")
"""Folders of files that nothing is built from."""


def flip(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def zero(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    length = min(ZEROS, len(content) - at)
    return content[:at] + bytes(length) + content[at + length :]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "a flipped bit": flip,
    "zeros": zero,
    "cut short": lambda content, rng: content[: rng.randrange(1, max(2, len(content)))],
    "emptied": lambda content, rng: b"",
    "deleted": lambda content, rng: None,
}


def damaged(campaign: Campaign, scene: Scene, fault: str, rng: random.Random) -> Verdict:
    """One trial; of the scene the command alone matters, and it comes after the damage."""
    state = rng.choice(STATES)
    command = scene.command if scene.command in NEXT else rng.choice(NEXT)
    folder, work = campaign.stage.copy(state)
    path = draw_file(work, rng)
    how = rng.choice(list(DAMAGE))
    harm(path, DAMAGE[how], rng)
    name = str(path.relative_to(work))
    looks = [("validate", str(work)), ("status", str(work), "--check")]
    words = [*looks, campaign.stage.words(command, work), *looks]
    ends = [run(work, one, folder) for one in words]
    expected = campaign.stage.outcome((*state, command)).facts
    lines = differences(facts(work), expected)
    faults = faults_of_ends(ends)
    if lines and not is_named(ends, path, work):
        faults.append("silent differences")
    if not faults:
        shutil.rmtree(folder)
    met = f"{name}: {how} after {', '.join(state)}"
    return Verdict(fault, command, 0, met, tuple(faults), detail_of(ends, lines))


def draw_file(work: Path, rng: random.Random) -> Path:
    """A file with content; first its kind is drawn."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        if path.is_file() and path.stat().st_size and not name.startswith(WITHOUT_MEANING):
            kinds.setdefault(kind_of(name), []).append(path)
    return rng.choice(kinds[rng.choice(list(kinds))])


def harm(
    path: Path, change: Callable[[bytes, random.Random], bytes | None], rng: random.Random
) -> None:
    """Change a file in place; a disk that loses bits tells no time of change."""
    status = path.stat()
    content = change(path.read_bytes(), rng)
    if content is None:
        path.unlink()
        return
    path.write_bytes(content)
    if rng.random() < 0.5:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def is_named(ends: list[Ended], path: Path, work: Path) -> bool:
    """Whether a command names the damaged file, or its shard, or refuses with a line of its own."""
    names = [str(path.relative_to(work)), path.name]
    if path.parent.name == "images":
        names.append(str(path.parent.relative_to(work)))
    if path.stem.isdecimal():
        names.append(f"shard {int(path.stem)}")
    return any(
        any(name in ended.output for name in names)
        or (ended.status == 1 and "stream-engine: " in ended.output)
        for ended in ends
    )
