"""A power cut: what a file system may hold of the changes that a command made up to a moment.

The changes are recorded once. Up to the moment they are replayed in memory, and a state is drawn of
those that POSIX allows, which is less than most file systems keep:

- what was written to a file since its last fsync is there, lost, cut, or zeros;
- of the changes of a folder's entries since its last fsync any first part is there, for each folder
  by itself or for all in their order. A new folder is an entry of the one above it.

That state is written to a fresh folder, an hour goes by for its leases, and the same command is
given again. What is not drawn: writes to one file out of their order, and another boot's identity.
"""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tests.faults.hook import Change, kind_of
from tests.faults.scenes import Scene
from tests.faults.stalls import make_leases_old
from tests.faults.trial import Harm, start
from tests.faults.verdicts import Verdict

if TYPE_CHECKING:
    from tests.faults.campaign import Campaign

CLAIM = re.compile(r"(\..+\.)([0-9a-f]+)(-[0-9a-f]+-[0-9a-f]+\.\d+\.claim)")
"""The name of a claim; the second part is the inode of the file that it is on."""
Entries = dict[str, "Node | None"]


class Node:
    """A file, folder or symbolic link."""

    def __init__(self, kind: Literal["file", "folder", "link"], inode: int = 0) -> None:
        self.kind = kind
        self.inode = inode
        self.data = bytearray()
        self.durable = b""
        self.changed_ns = 0
        self.target = ""
        self.entries: dict[str, Node] = {}
        self.first: dict[str, Node] = {}
        """Entries that were there from the outset."""
        self.log: list[tuple[int, Entries]] = []
        """Changes of the entries, each with its place among all changes."""
        self.num_synced = 0

    def change(self, number: int, entries: Entries) -> None:
        self.log.append((number, entries))
        apply_entries(self.entries, entries)

    def entries_after(self, num_kept: int) -> dict[str, Node]:
        """The entries when only the first of the changes are there."""
        found = dict(self.first)
        for _, entries in self.log[:num_kept]:
            apply_entries(found, entries)
        return found


def apply_entries(of: dict[str, Node], entries: Entries) -> None:
    for name, node in entries.items():
        if node is None:
            of.pop(name, None)
        else:
            of[name] = node


def load(path: Path) -> Node:
    """A folder as it is on the disk, all of it durable."""
    node = Node("folder", path.stat().st_ino if path.exists() else 0)
    for inner in sorted(path.iterdir()) if path.exists() else ():
        if inner.is_symlink():
            child = Node("link")
            child.target = os.readlink(inner)
        elif inner.is_dir():
            child = load(inner)
        else:
            status = inner.stat()
            child = Node("file", status.st_ino)
            child.durable = inner.read_bytes()
            child.data, child.changed_ns = bytearray(child.durable), status.st_mtime_ns
        node.entries[inner.name] = node.first[inner.name] = child
    return node


class Replay:
    """A tree on which changes are made again."""

    def __init__(self, folder: Path) -> None:
        self.root = load(folder)
        self.by_inode: dict[int, Node] = {}
        self.take(self.root)

    def take(self, node: Node) -> None:
        self.by_inode[node.inode] = node
        for child in node.entries.values():
            self.take(child)

    def place(self, path: str) -> tuple[Node, str]:
        """The folder that a path lies in, and its name there."""
        *folders, name = path.split("/")
        node = self.root
        for folder in folders:
            node = node.entries[folder]
        return node, name

    def new(self, change: Change, kind: Literal["file", "folder", "link"]) -> Node:
        node = Node(kind, change.inode)
        if change.inode:
            self.by_inode[change.inode] = node
        return node

    def make(self, number: int, change: Change) -> None:
        """Make one change again."""
        if change.path == ".":
            if change.call == "mkdir":
                self.by_inode[change.inode] = self.root
            elif change.call == "fsync":
                self.root.num_synced = len(self.root.log)
            return
        if change.call in ("write", "truncate", "fsync", "utime"):
            self.change_content(change)
            return
        folder, name = self.place(change.path)
        if change.call in ("unlink", "rmdir"):
            folder.change(number, {name: None})
        elif change.call == "create":
            folder.change(number, {name: self.new(change, "file")})
        elif change.call == "mkdir":
            folder.change(number, {name: self.new(change, "folder")})
        elif change.call == "symlink":
            node = Node("link")
            node.target = change.target
            folder.change(number, {name: node})
        else:
            before, old = self.place(change.target)
            node = before.entries[old]
            if change.call == "link" or before is not folder:
                folder.change(number, {name: node})
            if change.call == "rename":
                before.change(number, {old: None} | ({name: node} if before is folder else {}))

    def change_content(self, change: Change) -> None:
        node = self.by_inode[change.inode]
        if change.call == "write":
            node.data.extend(bytes(max(0, change.offset - len(node.data))))
            node.data[change.offset : change.offset + len(change.data)] = change.data
        elif change.call == "truncate":
            del node.data[change.offset :]
        elif change.call == "utime":
            node.changed_ns = change.offset
        elif node.kind == "folder":
            node.num_synced = len(node.log)
        else:
            node.durable = bytes(node.data)


def content_after(node: Node, rng: random.Random) -> bytes:
    """What a file holds after the cut, if its name is there."""
    live = bytes(node.data)
    if live == node.durable:
        return live
    draws: list[Callable[[], bytes]] = [
        lambda: live,
        lambda: node.durable,
        lambda: node.durable[: len(live)] + bytes(max(0, len(live) - len(node.durable))),
        lambda: live[: rng.randrange(len(live) + 1)],
    ]
    return rng.choice(draws)()


def write_state(root: Node, target: Path, rng: random.Random) -> str:
    """Write a state that is allowed; returns how it was drawn."""
    how = rng.choice(("nothing more", "all names", "each folder", "in order"))
    latest = max((number for node in folders_of(root) for number, _ in node.log), default=0)
    until = rng.randrange(latest + 1)

    def num_kept(node: Node) -> int:
        in_order = sum(number <= until for number, _ in node.log)
        return {
            "nothing more": node.num_synced,
            "all names": len(node.log),
            "each folder": rng.randint(node.num_synced, len(node.log)),
            "in order": max(node.num_synced, in_order),
        }[how]

    inodes: dict[int, int] = {}
    links: list[tuple[Path, str]] = []
    written: dict[Node, Path] = {}

    def write(node: Node, path: Path) -> None:
        if node.kind == "link":
            links.append((path, node.target))
        elif node.kind == "folder":
            path.mkdir(parents=True)
            for name, child in node.entries_after(num_kept(node)).items():
                write(child, path / name)
        elif node in written:
            os.link(written[node], path)
        else:
            path.write_bytes(content_after(node, rng))
            if node.changed_ns:
                os.utime(path, ns=(node.changed_ns, node.changed_ns))
            inodes[node.inode] = path.stat().st_ino
            written[node] = path

    write(root, target)
    for path, points_to in links:
        found = CLAIM.fullmatch(path.name)
        if found and int(found[2], 16) in inodes:
            path = path.with_name(f"{found[1]}{inodes[int(found[2], 16)]:x}{found[3]}")
        os.symlink(points_to, path)
    return how


def folders_of(node: Node) -> list[Node]:
    found = [node] if node.kind == "folder" else []
    return found + [inner for child in node.entries.values() for inner in folders_of(child)]


def recorded(campaign: Campaign, scene: Scene) -> tuple[Replay, list[Change]]:
    """The state before a scene's command, and the changes that it makes there."""
    if scene.name not in campaign.cuts:
        folder, work = campaign.stage.copy(scene.before)
        replay = Replay(work)
        running = start(work, campaign.words(scene, work), folder, Harm("record"))
        ended = running.wait()
        assert ended.status in (0, 2), ended.output
        campaign.cuts[scene.name] = replay, running.changes()
    return campaign.cuts[scene.name]


def cut(campaign: Campaign, scene: Scene, fault: str, rng: random.Random) -> Verdict:
    """One trial."""
    first, changes = recorded(campaign, scene)
    kinds: dict[tuple[str, str], list[int]] = {}
    for number, change in enumerate(changes, start=1):
        kinds.setdefault((change.call, kind_of(change.path)), []).append(number)
    at = rng.choice(kinds[rng.choice(list(kinds))])
    replay = copy.deepcopy(first)
    for number, change in enumerate(changes[:at], start=1):
        replay.make(number, change)
    folder, work = campaign.stage.copy(())
    how = write_state(replay.root, work, rng)
    make_leases_old(work)
    faults, detail = campaign.again(scene, work, folder)
    if not faults:
        shutil.rmtree(folder)
    met = f"{at}: {changes[at - 1].call} {changes[at - 1].path}; kept: {how}"
    return Verdict(fault, scene.name, 0, met, tuple(dict.fromkeys(faults)), detail)
