"""The house has floors, and imports go down only. Read from the import statements themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "stream_engine": ROOT / "stream_engine",
    "stream_kernels": ROOT / "kernels/stream_kernels",
}

# From the ground up. A module may import its own floor and those below it.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"stream_kernels"}),
    frozenset({"records", "config", "errors", "device_errors", "ranks"}),
    frozenset(
        {"store", "models", "engine", "pipelines", "run_dir", "inputs", "outputs", "pairs", "work"}
    ),
    frozenset({"cli", "demo", "__main__"}),
)
LIGHT = ("cli", "inputs", "outputs", "pairs", "pipelines", "run_dir", "store")


def floor_of(module: str) -> int | None:
    """Floor of `stream_engine.store.leases`: that of "store". None for the package itself."""
    parts = module.split(".")
    room = parts[0] if parts[0] == "stream_kernels" else ".".join(parts[1:2])
    if not room:
        return None
    for level, rooms in enumerate(FLOORS):
        if room in rooms:
            return level
    raise AssertionError(f"{module} stands on no floor: give it one in tests/test_floors.py")


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


def imports(path: Path, *, at_start_only: bool = False) -> list[str]:
    """Modules of ours that a file imports, type-checking imports left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if at_start_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append(node.module or "")
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def ours(names: list[str]) -> list[str]:
    """Of imported names, those that are modules or packages of ours."""
    known = {name for name, _ in modules()}
    return [name for name in names if name in known]


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_go_down_only(module: str, path: Path) -> None:
    own = floor_of(module)
    for imported in ours(imports(path)):
        floor = floor_of(imported)
        if own is None:  # the package itself only offers names, on first use
            assert not ours(imports(path, at_start_only=True))
            continue
        assert floor is None or floor <= own, f"{module} imports {imported}, which is above it"


def test_kernels_import_nothing_of_the_engine() -> None:
    for module, path in modules():
        if module.startswith("stream_kernels"):
            above = [name for name in imports(path) if name.startswith("stream_engine")]
            assert not above, f"{module} imports {above}"


def test_pipelines_never_touch_files() -> None:
    rooms = ("stream_engine.store", "stream_engine.run_dir", "stream_engine.inputs")
    for module, path in modules():
        if module.startswith("stream_engine.pipelines"):
            files = [name for name in imports(path) if name.startswith(rooms)]
            assert not files, f"{module} imports {files}"


@pytest.mark.parametrize("room", LIGHT)
def test_importing_does_not_import_torch(room: str) -> None:
    names = [n for n, _ in modules() if n.split(".")[1:2] == [room]]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert names, f"no module stream_engine.{room}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
