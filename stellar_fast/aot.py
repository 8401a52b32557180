"""Triton kernels compiled ahead of time, on any machine: registers, shared memory, spills, instructions, occupancy.

A room's `kernel.inspect_launches(shape, dtype, config)` calls its launch functions on meta tensors. What they would
launch is compiled with the specialisation that a real call gets (a pointer or integer divisible by 16 is known to be,
an integer 1 is a constant) and read back from the machine code.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch

from stellar_fast import backend
from stellar_fast.kernels.common.launch import Launch, record
from stellar_fast.registry import Shape, load
from stellar_fast.resources import parse

REGISTERS, MOST_BLOCKS, MOST_WARPS = 65536, 32, 64  # of a multiprocessor, on all three


@dataclass(frozen=True)
class Architecture:
    """Shared memory in bytes of one GPU generation, by the CUDA programming guide's table of compute capabilities."""

    capability: int
    shared_of_block: int
    shared_of_multiprocessor: int  # every resident block takes 1 KiB beside its own


ARCHITECTURES = {
    "sm_80": Architecture(80, 166_912, 167_936),
    "sm_90": Architecture(90, 232_448, 233_472),
    "sm_100": Architecture(100, 232_448, 233_472),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_DTYPES = ("bf16", "fp32")

PRODUCT_16_BIT = re.compile(r"tt\.dot\b.* : tensor<[\dx]+x(?:bf16|f16)>")
# SASS. Registers that do not fit show as loads and stores of local memory.
MNEMONIC = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
SPILL = re.compile(r"LDL|STL")
LOAD, LOAD_128 = re.compile(r"LDG(?:STS)?\b"), re.compile(r"LDG(?:STS)?\..*\b(?:128|256)$")


@dataclass(frozen=True)
class Figures:
    """What one kernel needs, compiled for one architecture; `problems` says why it must not ship."""

    op: str
    kernel: str
    shape: str
    dtype: str
    arch: str
    config: str
    registers: int
    shared_bytes: int
    spills: int  # instructions
    tensor_core: dict[str, int]  # instructions by name
    loads: int  # instructions that read global memory
    loads_128: int  # of them, those of 128 bits or more
    occupancy: float  # resident warps over the most that are possible
    problems: tuple[str, ...]


def occupancy(arch: str, registers: int, shared_bytes: int, warps: int) -> float:
    """Share of a multiprocessor's warps that can be resident, by registers, shared memory and blocks."""
    of_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256, a quarter of them to each scheduler
    by_registers = 4 * (REGISTERS // 4 // max(of_warp, 256)) // warps
    by_shared = ARCHITECTURES[arch].shared_of_multiprocessor // (shared_bytes + 1024)
    return min(by_registers, by_shared, MOST_BLOCKS, MOST_WARPS // warps) * warps / MOST_WARPS


def problems(arch: str, spills: int, shared_bytes: int, products_16_bit: int, tensor_core: int) -> tuple[str, ...]:
    """Why a compiled kernel must not ship."""
    limit = ARCHITECTURES[arch].shared_of_block
    found = []
    if spills:
        found.append(f"{spills} instructions spill registers")
    if shared_bytes > limit:
        found.append(f"{shared_bytes} bytes of shared memory, a block can have {limit}")
    if products_16_bit and not tensor_core:
        found.append("16-bit products without a tensor-core instruction")
    return tuple(found)


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one architecture."""

    op: str
    shape: str
    dtype: str
    arch: str
    launch: Launch
    source: Any
    target: Any
    options: dict[str, Any]

    @classmethod
    def of(cls, op: str, shape: str, dtype: str, arch: str, launch: Launch) -> "Job":
        """What triton.compile takes, by triton's own binder: the same specialisation as in a real launch."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        kernel, target = launch.kernel, GPUTarget("cuda", ARCHITECTURES[arch].capability, 32)
        compiler = make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        bound, specialization, options = bind(*launch.arguments, debug=False, **launch.options)
        options, signature, constants, attributes = kernel._pack_args(
            compiler, launch.options, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        return cls(op, shape, dtype, arch, launch, source, target, options.__dict__)

    @property
    def key(self) -> str:
        """The same for jobs that compile to the same code."""
        return f"{self.arch} {self.source.hash()} {sorted(self.options.items(), key=str)}"

    def run(self) -> Figures:
        import triton

        compiled = triton.compile(self.source, target=self.target, options=self.options)
        registers, mnemonics = _disassemble(compiled.asm["cubin"], Path(triton.__file__).parent)
        tensor_core: Counter[str] = Counter()
        for mnemonic, count in mnemonics.items():
            if TENSOR_CORE.match(mnemonic):
                tensor_core[mnemonic.partition(".")[0]] += count
        spills, loads = _count(mnemonics, SPILL), _count(mnemonics, LOAD)
        products = len(PRODUCT_16_BIT.findall(compiled.asm["ttir"]))
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        knobs = {name: value for name, value in self.launch.options.items() if name != "enable_fp_fusion"}
        return Figures(
            op=self.op,
            kernel=self.source.name,
            shape=self.shape,
            dtype=self.dtype,
            arch=self.arch,
            config=" ".join(f"{name}={value}" for name, value in knobs.items()),
            registers=registers,
            shared_bytes=shared,
            spills=spills,
            tensor_core=dict(tensor_core),
            loads=loads,
            loads_128=_count(mnemonics, LOAD_128),
            occupancy=occupancy(self.arch, registers, shared, warps),
            problems=problems(self.arch, spills, shared, products, sum(tensor_core.values())),
        )


def inspect(
    ops: Sequence[str] = (), archs: Sequence[str] = tuple(ARCHITECTURES), every_shape: bool = False
) -> list[Figures]:
    """Compile the heuristic's configs of operators with Triton kernels, and read the machine code.

    Args:
        ops: names; none: all that have Triton kernels.
        archs: of ARCHITECTURES.
        every_shape: all of the spec's shapes but "small", in all its dtypes; otherwise those of b16 in bf16 and fp32.
            Kernels that compile to the same code for several shapes are listed once.

    Raises:
        ValueError: an unknown name, an operator without Triton kernels, triton absent, or TRITON_INTERPRET set.
    """
    if backend.interpreting():
        raise ValueError("TRITON_INTERPRET=1 keeps triton from compiling: unset it to inspect kernels")
    try:
        import_module("triton")
    except Exception as error:
        raise ValueError(f"triton does not import ({error}): pip install 'stellar-fast[triton]'") from error
    unknown = [arch for arch in archs if arch not in ARCHITECTURES]
    if unknown:
        raise ValueError(f"unknown architecture {unknown[0]!r}; known: {', '.join(ARCHITECTURES)}")
    jobs: dict[str, Job] = {}
    for op in ops or [op for op, written in backend.OPS.items() if "triton" in written]:
        spec = load(op)
        if "triton" not in spec.backends:
            raise ValueError(f"{op} has no Triton kernels; its backends: {', '.join(spec.backends)}")
        shapes = [name for name in spec.shapes if name != "small" and (every_shape or name.startswith("b16"))]
        dtypes = [name for name in (DTYPES if every_shape else DEFAULT_DTYPES) if DTYPES[name] in spec.dtypes]
        for shape, dtype, arch in product(shapes, dtypes, archs):
            for launch in _launches(op, spec.shapes[shape], DTYPES[dtype], arch):
                job = Job.of(op, shape, dtype, arch, launch)
                jobs.setdefault(job.key, job)
    # compiling is C++ and a process of ptxas, both without the interpreter's lock
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(Job.run, jobs.values()))


def _launches(op: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Launch]:
    room = f"stellar_fast.kernels.{op}"
    config = import_module(f"{room}.config").heuristic(shape, dtype, arch)
    with record() as launches:
        import_module(f"{room}.kernel").inspect_launches(shape, dtype, config)
    return launches


def _disassemble(cubin: bytes, triton_folder: Path) -> tuple[int, Counter[str]]:
    """Registers of a thread, and how often each instruction occurs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
        run = subprocess.run([tool, "-res-usage", "-sass", path], capture_output=True, text=True, check=True)
    kernels = parse(run.stdout)
    assert len(kernels) == 1, run.stdout + run.stderr
    return kernels[0].registers, Counter(MNEMONIC.findall(run.stdout))


def _count(mnemonics: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(n for mnemonic, n in mnemonics.items() if pattern.match(mnemonic))
