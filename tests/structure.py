"""The house as its import statements draw it: rooms, arrows between them, and what is out of order.

    python -m tests.structure            the counts, arrows that run up, circles, what is too long
    python -m tests.structure --arrows   every arrow between rooms as well

A room is a package of `stream_engine` or one of the files beside them; the package `stream_kernels`
stands beneath. A floor is a layer, a circle an import cycle. An arrow leads from a room to another
of which it imports anything, anywhere in its files: inside functions and under TYPE_CHECKING too.
It runs up when the other room does not stand below in FLOORS. A circle is a set of files that
import each other, directly or through one another, in the same room or not. The package's own
`__init__` and `__main__` are the front door, not a room.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "stream_engine": ROOT / "stream_engine",
    "stream_kernels": ROOT / "kernels/stream_kernels",
}
KERNELS = "stream_kernels"
FRONT_DOOR = ("stream_engine", "stream_engine.__main__")

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "extensions", "text", "timing", KERNELS}),
    frozenset({"config_file", "servers"}),
    frozenset({"config", "device_errors", "ranks", "records"}),
    frozenset({"pictures"}),
    frozenset({"remote", "store"}),
    frozenset({"demo", "models"}),
    frozenset({"engine"}),
    frozenset({"pipelines", "run_dir"}),
    frozenset({"inputs"}),
    frozenset({"outputs"}),
    frozenset({"pairs"}),
    frozenset({"report", "work"}),
    frozenset({"api"}),
    frozenset({"cli"}),
)
"""From the ground up. A room imports only rooms of floors below its own."""

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60  # from its `def` to its last line


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name; a package by the name of its `__init__`."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def room_of(module: str) -> str:
    """`store` for stream_engine.store.leases."""
    parts = module.split(".")
    return parts[0] if parts[0] != "stream_engine" or len(parts) == 1 else parts[1]


def floor_of(room: str) -> int:
    """The floor on which a room stands, from 0.

    Raises:
        KeyError: for a room that FLOORS does not know.
    """
    for level, rooms in enumerate(FLOORS):
        if room in rooms:
            return level
    raise KeyError(f"room {room!r} stands on no floor: give it one in tests/structure.py")


def imported_names(path: Path, *, at_start_only: bool = False) -> Iterator[str]:
    """The dotted names that a file imports, a module and each name taken from it.

    With `at_start_only`, those of functions and under TYPE_CHECKING are left out.
    """

    def visit(node: ast.AST) -> Iterator[str]:
        if at_start_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if at_start_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if not all(name in modules() for name in names):  # else files of a package, one by one
                yield node.module or ""
            yield from names
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def file_imports() -> dict[str, set[str]]:
    """For each module, the modules of ours that it imports."""
    known = modules()
    return {
        module: {name for name in imported_names(path) if name in known} - {module, *FRONT_DOOR}
        for module, path in known.items()
    }


def room_arrows(imports: dict[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """Arrows between rooms, each with the files behind it as `importer -> imported`."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for module, targets in sorted(imports.items()):
        for target in sorted(targets):
            if module in FRONT_DOOR:
                continue
            ends = room_of(module), room_of(target)
            if ends[0] != ends[1]:
                arrows.setdefault(ends, []).append(f"{module} -> {target}")
    return arrows


def runs_up(arrow: tuple[str, str]) -> bool:
    return floor_of(arrow[0]) <= floor_of(arrow[1])


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Sets of two or more files that reach each other by imports (Tarjan's algorithm).

    A package's `__init__` that offers names of its own files counts as a file like any other.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def connect(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(imports[node]):
            if target not in index:
                connect(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            members = [stack.pop()]
            while members[-1] != node:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(imports):
        if node not in index:
            connect(node)
    return found


def too_long(path: Path) -> list[str]:
    """What of a file is longer than it may be, each as `path:line: name, number of lines`."""
    text = path.read_text(encoding="utf-8")
    spans = [
        (node.lineno, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    found = [span for span in spans if span[2] > MOST_LINES_OF_A_FUNCTION]
    num_lines = len(text.splitlines())
    if num_lines > MOST_LINES_OF_A_FILE:
        found.append((1, "the file", num_lines))
    return [f"{path}:{line}: {name}, {lines} lines" for line, name, lines in sorted(found)]


def main(words: list[str]) -> int:
    """Print the house; 1 when an arrow runs up, files form a circle, or something is too long."""
    imports = file_imports()
    arrows = room_arrows(imports)
    rooms = {room_of(module) for module in imports if module not in FRONT_DOOR} - {KERNELS}
    up = [arrow for arrow in arrows if runs_up(arrow)]
    found = circles(imports)
    long = [text for path in modules().values() for text in too_long(path)]
    print(f"{len(rooms)} rooms, {len(arrows)} arrows, {len(up)} up, {len(found)} circles")
    for arrow in sorted(arrows) if "--arrows" in words else ():
        print(f"{arrow[0]} -> {arrow[1]}  ({len(arrows[arrow])})")
    for arrow in up:
        print(f"up: {arrow[0]} -> {arrow[1]}", *arrows[arrow], sep="\n    ")
    for members in found:
        print(f"circle: {', '.join(members)}")
    for text in long:
        print(f"too long: {text}")
    return 1 if up or found or long else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
