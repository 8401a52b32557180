"""What compiled GPU code needs of a multiprocessor, as `cuobjdump -res-usage` says; any machine can read it.

It is part of the CUDA toolkit, and of the triton package.
"""

import contextlib
import ctypes
import importlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stellar_fast import native

_ARCHITECTURE = re.compile(r"^arch = (\w+)$")
_OPERATOR = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cuda_cu_")  # in the anonymous namespace of its file
_KERNEL = re.compile(r"^ *Function (\S+):$")
_FIGURE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Resources:
    """Of one kernel, compiled for one architecture."""

    op: str  # empty where the kernel does not come from <op>_cuda.cu
    kernel: str
    arch: str  # empty where the file does not name it
    registers: int  # of a thread
    shared_bytes: int  # of a block, without what is asked for at launch
    local_bytes: int  # of a thread, in local memory: registers that did not fit, or an array with a computed index

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the kernel must not ship."""
        return (f"{self.local_bytes} bytes of local memory a thread",) if self.local_bytes else ()


def _demangled(name: str) -> str:
    """By the C++ library that torch brings; the name itself where that is another, or for a name of C."""
    if not name.startswith("_Z"):
        return name
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        free = ctypes.CDLL(None).free
    except OSError:
        return name
    demangle = library.__cxa_demangle
    demangle.restype, demangle.argtypes = ctypes.c_void_p, [ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    if not (found := demangle(name.encode(), None, None, None)):
        return name
    try:
        return ctypes.string_at(found).decode()
    finally:
        free(found)


def _short(signature: str) -> str:
    """`void a::(anonymous namespace)::f<a::T, 2>(int)` as `f<T, 2>`."""
    name = re.sub(r"\(anonymous namespace\)::", "", signature)
    name = re.sub(r"\b\w+::", "", name).removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):  # the first parenthesis that is not within the template's arguments
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def parse(text: str) -> list[Resources]:
    """Read what `cuobjdump -res-usage` prints of a cubin, an object file or a library."""
    rows, arch, kernel = [], "", ""
    for line in text.splitlines():
        if found := _ARCHITECTURE.match(line):
            arch = found[1]
        elif found := _KERNEL.match(line):
            kernel = found[1]
        elif kernel and (figures := dict(_FIGURE.findall(line))):
            registers, stack, shared, local = (int(figures[name]) for name in ("REG", "STACK", "SHARED", "LOCAL"))
            op = of_op[1] if (of_op := _OPERATOR.search(kernel)) else ""
            rows.append(Resources(op, _short(_demangled(kernel)), arch, registers, shared, stack + local))
            kernel = ""
    return rows


def cuobjdump() -> Path | None:
    """The tool, beside nvcc or in the triton package; None where there is neither."""
    folders = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    with contextlib.suppress(Exception):  # a package built for another torch may raise anything
        folders.append(Path(importlib.import_module("triton").__file__ or "").parent / "backends" / "nvidia" / "bin")
    found = (shutil.which("cuobjdump", path=folder) for folder in folders)
    return next((Path(tool) for tool in found if tool), None)


def of_library(path: str | Path) -> list[Resources]:
    """Every kernel in a library, for every architecture that it was compiled for.

    Raises:
        ValueError: there is no cuobjdump.
    """
    tool = cuobjdump()
    if tool is None:
        raise ValueError("no cuobjdump beside nvcc, nor in a triton package")
    run = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return sorted(parse(run.stdout), key=lambda row: (row.op, row.kernel, int(re.sub(r"\D", "", row.arch) or 0)))


def of_native_module() -> list[Resources]:
    """Every kernel of `stellar_fast._C`; none where it has no CUDA half."""
    if "cuda_architectures" not in native.build_info():
        return []
    return of_library(str(native.module().__file__))
