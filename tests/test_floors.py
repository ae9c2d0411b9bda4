"""The house has floors, and imports go down only; `python -m tests.structure` draws it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure import (
    FRONT_DOOR,
    KERNELS,
    ROOT,
    circles,
    file_imports,
    floor_of,
    imported_names,
    modules,
    room_arrows,
    room_of,
    runs_up,
    too_long,
)

LIGHT = ("cli", "inputs", "outputs", "pairs", "pipelines", "run_dir", "store")
FILES_KNOWN_TO = {
    "pipelines": {"store", "run_dir", "inputs", "outputs"},
    "engine": {"store", "run_dir", "inputs", "outputs"},
    "run_dir": {"models", "engine", "pipelines"},
}
"""Rooms that stand lower, and still are none of a room's business."""


def test_every_room_stands_on_a_floor() -> None:
    for module in modules():
        if module not in FRONT_DOOR:
            floor_of(room_of(module))


def test_imports_go_down_only() -> None:
    arrows = room_arrows(file_imports())
    assert {arrow: files for arrow, files in arrows.items() if runs_up(arrow)} == {}


def test_no_file_imports_itself_through_others() -> None:
    assert circles(file_imports()) == []


def test_a_circle_and_an_arrow_that_runs_up_are_found() -> None:
    imports = {
        "stream_engine.store.a": {"stream_engine.store.b"},
        "stream_engine.store.b": {"stream_engine.store.c", "stream_engine.work.worker"},
        "stream_engine.store.c": {"stream_engine.store.a"},
        "stream_engine.work.worker": set(),
    }
    assert circles(imports) == [[f"stream_engine.store.{name}" for name in "abc"]]
    assert [arrow for arrow in room_arrows(imports) if runs_up(arrow)] == [("store", "work")]


def test_no_file_and_no_function_is_too_long() -> None:
    assert [text for path in modules().values() for text in too_long(path)] == []


def test_a_file_and_a_function_that_are_too_long_are_found(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    body = "    pass\n"
    path.write_text(f"def fits():\n{body * 59}\nclass A:\n    def f(self):\n{('    ' + body) * 60}")
    assert too_long(path) == [f"{path}:63: f, 61 lines"]
    path.write_text("# a line\n" * 401)
    assert too_long(path) == [f"{path}:1: the file, 401 lines"]
    path.write_text("# a line\n" * 400)
    assert too_long(path) == []


@pytest.mark.parametrize("room", FILES_KNOWN_TO)
def test_rooms_leave_alone_what_is_none_of_their_business(room: str) -> None:
    arrows = room_arrows(file_imports())
    assert [
        arrow for arrow in arrows if arrow[0] == room and arrow[1] in FILES_KNOWN_TO[room]
    ] == []


def test_kernels_import_nothing_of_the_engine() -> None:
    assert [arrow for arrow in room_arrows(file_imports()) if arrow[0] == KERNELS] == []


def test_the_front_door_imports_nothing_at_start() -> None:
    at_start = imported_names(modules()["stream_engine"], at_start_only=True)
    assert [name for name in at_start if name in modules()] == []


@pytest.mark.parametrize("room", LIGHT)
def test_importing_does_not_import_torch(room: str) -> None:
    names = [module for module in modules() if module.split(".")[1:2] == [room]]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert names, f"no module stream_engine.{room}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
