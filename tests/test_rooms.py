"""One name is an operator's address everywhere, and what stands there is complete."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from stellar_fast import backend, ops
from stellar_fast.registry import OpSpec, load

ROOT = Path(__file__).parents[1]
COMMON = "common"
NATIVE_ONLY = {"build_info"}  # in csrc and in CMakeLists.txt, but no operator


def rooms(folder: str) -> set[str]:
    return {path.name for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"}


def cmake_ops() -> set[str]:
    listed = re.search(r"^set\(OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert listed
    return set(listed[1].split())


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            assert node.module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("op", backend.OPS)
def test_a_room_is_complete(op: str) -> None:
    room = ROOT / "kernels" / op
    needed = [room / "__init__.py", room / "reference.py", room / "spec.py"]
    needed += [ROOT / "stellar_fast" / "ops" / f"{op}.py", ROOT / "tests" / "ops" / f"test_{op}.py"]
    needed += [ROOT / "benchmarks" / "ops" / f"{op}.py"]
    if "triton" in backend.OPS[op]:
        needed += [room / "kernel.py", room / "config.py"]
    missing = [str(path.relative_to(ROOT)) for path in needed if not path.exists()]
    assert not missing
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), "the maths in five lines"
    assert re.search(rf"^\| `{op}` \|", (ROOT / "docs" / "ops.md").read_text(), re.MULTILINE), "a row in docs/ops.md"


@pytest.mark.parametrize("op", backend.OPS)
def test_a_spec_says_what_tests_and_benchmarks_need(op: str) -> None:
    spec = load(op)
    assert isinstance(spec, OpSpec) and spec.name == op
    assert (spec.public or op) in ops.__all__ and callable(spec.function)
    assert "small" in spec.shapes and len(spec.shapes) > 1
    for shape in spec.shapes.values():
        assert spec.bytes(shape, 4) > 0 and spec.flops(shape) >= 0
    if "triton" in spec.backends:
        assert any(name.startswith("b16") for name in spec.shapes), "the shapes that inspect compiles for"


@pytest.mark.parametrize("op", [op for op, written in backend.OPS.items() if "triton" in written])
def test_a_triton_room_has_one_launch_path(op: str) -> None:
    room = ROOT / "kernels" / op
    functions = {n.name for n in ast.parse((room / "kernel.py").read_text()).body if isinstance(n, ast.FunctionDef)}
    assert {f"launch_{op}_fwd", "inspect_launches"} <= functions
    if load(op).gradients:
        assert f"launch_{op}_bwd" in functions
    config = importlib.import_module(f"stellar_fast.kernels.{op}.config")
    assert callable(config.heuristic) and callable(config.candidates) and callable(config.is_valid)
    assert not any(name.split(".")[0] == "triton" for name in imported(room / "config.py"))
    spec = load(op)
    for shape in [*spec.shapes.values(), *spec.odd_shapes]:
        for dtype in spec.dtypes:
            for device in ("cpu", "sm_80", "sm_90", "sm_100"):
                chosen = config.heuristic(shape, dtype, device)
                assert config.is_valid(chosen, shape, dtype), f"{chosen} at {shape}, {dtype}, {device}"
            candidates = list(config.candidates(shape, dtype))
            assert candidates and all(config.is_valid(c, shape, dtype) for c in candidates)


def test_kernels_without_the_triton_backend_do_not_exist() -> None:
    for room in rooms("kernels") - {COMMON}:
        if (ROOT / "kernels" / room / "kernel.py").exists():
            assert "triton" in backend.OPS[room], room


def test_native_rooms_are_those_of_the_build_and_of_the_table() -> None:
    native = {op for op, written in backend.OPS.items() if {"cpu", "cuda"} & set(written)}
    found = rooms("csrc") - {COMMON}
    assert found == cmake_ops()
    assert native <= found
    for op in found - NATIVE_ONLY:
        assert op in backend.OPS, op
        assert (ROOT / "csrc" / op / f"{op}.h").exists() and (ROOT / "csrc" / op / f"{op}_cpu.cpp").exists(), op
        assert ("cuda" in backend.OPS[op]) == (ROOT / "csrc" / op / f"{op}_cuda.cu").exists(), op


def test_no_stray_rooms() -> None:
    assert rooms("kernels") - {COMMON} == set(backend.OPS)
    for folder, prefix, others in (
        ("stellar_fast/ops", "", {"__init__", "checks", "flops", "from_weight", "scratch"}),
        ("tests/ops", "test_", set()),
        ("benchmarks/ops", "", {"__init__", "case"}),
    ):
        names = {path.stem.removeprefix(prefix) for path in (ROOT / folder).glob("*.py")}
        assert names - others == set(backend.OPS), folder


def test_rooms_do_not_know_each_other() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        room = path.relative_to(ROOT / "kernels").parts[0]
        for name in imported(path):
            if name.startswith("stellar_fast.kernels."):
                assert name.split(".")[2] in {room, COMMON}, f"{path} imports {name}"
            elif name.startswith("stellar_fast."):
                assert name.startswith("stellar_fast.registry"), f"{path} imports {name}"
            assert not name.startswith("kernels"), f"{path}: kernels/ is imported as stellar_fast.kernels"
    for path in (ROOT / "csrc").rglob("*"):
        room = path.relative_to(ROOT / "csrc").parts[0]
        if path.suffix in {".h", ".cpp", ".cu"} and path.parent != ROOT / "csrc":
            for included in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
                assert included.split("/")[0] in {room, COMMON}, f"{path} includes {included}"


def test_the_rooms_folder_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a top-level package called kernels is another project's"
    assert not list((ROOT / "kernels").rglob("triton.py")), "it would shadow the package"
