"""Compile Triton kernels for an H100 or H200 on a machine that has none, and read the result.

Triton ships ptxas, cuobjdump and nvdisasm, so registers, spills and instructions are known here.
"""

import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the hardware would get: per-thread registers, bytes spilled or on the stack, code."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str
    sass: str

    @property
    def spills(self) -> int:
        """Instructions that go to local memory."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass))

    @property
    def tensor_core_instructions(self) -> int:
        return len(re.findall(r"\bH(?:G)?MMA\b", self.sass))

    @property
    def loads_16_bytes(self) -> int:
        """Global loads of 16 bytes a thread (straight, or copied into shared memory)."""
        return len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.[\w.]*128", self.sass))

    @property
    def loops(self) -> list[str]:
        """The instructions of each loop, those of loops inside it among them."""
        labels: dict[str, int] = {}
        found, code = [], list[str]()
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
                code.append(line)
                back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
                if back and back[1] in labels:
                    found.append("\n".join(code[labels[back[1]] :]))
        return found

    @property
    def bulk_loads(self) -> int:
        """Tiles fetched by the tensor memory accelerator."""
        return len(re.findall(r"\bUTMALDG", self.sass))


def compile_for_sm90(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """Compile `kernel` with Triton types by argument name; pointers and strides are 16-aligned.

    An argument type ending in "/16" (as in "i32/16") says that the number is a multiple of 16.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        declared = arguments.get(name, "constexpr")
        signature[name] = declared.removesuffix("/16")
        if declared.endswith("/16") or declared.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, places, attributes),
        target=TARGET,
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        sass = _run("nvdisasm", "-c", cubin.name)
    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        stack_bytes=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        shared_bytes=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


class _AbsentDevice:
    """What Triton asks of the driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> str:
        return "sm_90"  # a key of its own in the table of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiled_launches() -> Iterator[list[tuple[str, int]]]:
    """Inside, a launch on CPU tensors compiles the kernel as it would be, and runs nothing.

    Gives (kernel, bytes of shared memory) of each launch so far.
    """
    launched: list[tuple[str, int]] = []
    run = JITFunction.run

    @functools.wraps(run)
    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        launched.append((self.__name__, kernel.metadata.shared))

    triton.runtime.driver.set_active(_AbsentDevice())
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield launched
    finally:
        triton.runtime.driver._active = None


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
