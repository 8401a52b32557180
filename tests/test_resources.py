"""What cuobjdump says of compiled kernels, and what follows from it."""

import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stellar_fast import aot, native, resources
from stellar_fast.cli import app
from stellar_fast.resources import Resources

TOY = "_ZN12stellar_fast44_GLOBAL__N__24f322a1_11_toy_cuda_cu_2f6dc26011pack_kernelI6__halfLi8EEEvPKT_S4_"
PRINTED = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function {TOY}:
  REG:31 STACK:0 SHARED:32 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_100
code version = [9,0]
compressed

Fatbin elf code:
================
arch = sm_100
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:16
 Function {TOY}:
  REG:32 STACK:8 SHARED:1056 LOCAL:4 CONSTANT[0]:936 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function plain_kernel:
  REG:255 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:936 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
GOOD = Resources("toy", "pack_kernel<__half, 8>", "sm_80", 31, 32, 0)
SPILLED = Resources("toy", "pack_kernel<__half, 8>", "sm_100", 32, 1056, 12)


def test_what_is_printed_is_read() -> None:
    rows = resources.parse(PRINTED)
    assert rows == [GOOD, SPILLED, Resources("", "plain_kernel", "sm_100", 255, 0, 0)]
    assert [row.problems for row in rows] == [(), ("12 bytes of local memory a thread",), ()]
    # of a cubin, whose architecture is not named, and of a library without kernels
    assert resources.parse("\nResource usage:\n Function f:\n  REG:9 STACK:0 SHARED:0 LOCAL:0\n") == [
        Resources("", "f", "", 9, 0, 0)
    ]
    assert resources.parse(PRINTED.partition(" Function")[0]) == []


@pytest.mark.parametrize(
    ("mangled", "short"),
    [
        (TOY, "pack_kernel<__half, 8>"),
        ("_ZN12stellar_fast6kernelEPfi", "kernel"),
        ("_ZN1a6kernelILN1b5DtypeE1EfEEvPT0_", "kernel<(Dtype)1, float>"),
        ("_attention_forward_kernel", "_attention_forward_kernel"),
    ],
)
def test_names_are_short(mangled: str, short: str) -> None:
    (row,) = resources.parse(f" Function {mangled}:\n  REG:9 STACK:0 SHARED:0 LOCAL:0")
    assert row.kernel == short


def test_every_kernel_of_the_native_module_is_listed_and_none_spills() -> None:
    rows = resources.of_native_module()
    assert [row for row in rows if row.problems] == []
    sources = {path.parent.name for path in (Path(__file__).parents[1] / "csrc").glob("*/*_cuda.cu")}
    with_kernels = {op for op in sources if op != "build_info"} if shutil.which("nvcc") else set()
    assert {row.op for row in rows} == with_kernels
    by_arch = [{(row.op, row.kernel) for row in rows if row.arch == arch} for arch in {row.arch for row in rows}]
    assert all(kernels == by_arch[0] for kernels in by_arch)


def test_the_build_check_prints_them_and_fails_for_a_spill(monkeypatch, capsys) -> None:
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_architectures": "800"})
    for rows, code in (([], 0), ([GOOD], 0), ([GOOD, SPILLED], 1)):
        monkeypatch.setattr(resources, "of_native_module", lambda rows=rows: rows)
        assert native.main() == code
        printed = capsys.readouterr()
        assert [line.split()[:4] for line in printed.out.splitlines() if line.startswith("toy")] == [
            [row.op, row.arch, str(row.registers), "registers"] for row in rows
        ]
        spilled = "toy pack_kernel<__half, 8> sm_100: 12 bytes of local memory a thread\n"
        assert printed.err == (spilled if code else "")


def test_inspect_lists_them_behind_the_triton_kernels(monkeypatch) -> None:
    monkeypatch.setattr(aot, "inspect", lambda *_: [])
    for rows, code in (([], 0), ([GOOD], 0), ([GOOD, SPILLED], 1)):
        monkeypatch.setattr(resources, "of_native_module", lambda rows=rows: rows)
        result = CliRunner().invoke(app, ["inspect"], env={"COLUMNS": "160"})
        assert result.exit_code == code
        assert ("toy (CUDA C++)" in result.output) == bool(rows)
        assert ("toy pack_kernel<__half, 8> sm_100: 12 bytes of local memory a thread" in result.output) == (code == 1)


def test_without_cuobjdump_they_are_not_read(monkeypatch, capsys) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_architectures": "800"})
    assert native.main() == 0
    assert "not read: no cuobjdump beside nvcc, nor in a triton package" in capsys.readouterr().out
