"""The native module: what it links, what it says of itself, and that the package works without it."""

import os
import shutil
import subprocess
import sys

from stellar_fast import native


def run_python(code: str, **environment: str) -> str:
    """Run code in a process of its own; return what it printed."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_native_module_is_built() -> None:
    assert native.available(), native.reason()
    assert native.reason() == ""
    info = native.build_info()
    assert info["compiler"] and "-O3" in str(info["flags"])
    assert info["simd_level"] in ("x86-64-v4", "x86-64-v3", "x86-64 baseline", "compiler default")
    if shutil.which("nvcc"):
        assert info["cuda_architectures"] and info["cuda_runtime_version"] >= 12000
        assert (info["cuda_device_count"] == 0) == bool(info["cuda_device_error"])


def test_native_module_links_neither_torch_nor_cudart() -> None:
    with open(str(native.module().__file__), "rb") as file:
        content = file.read()
    assert b"PyInit__C" in content
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in content


def test_one_openmp_runtime_is_shared_with_torch() -> None:
    code = "from stellar_fast import native; print(native.build_info()['openmp_library'], *native.openmp_libraries())"
    used, *loaded = map(os.path.realpath, run_python(code).split())
    assert loaded == [used]


def test_allocator_switch() -> None:
    code = "from stellar_fast import native; print(native.raise_allocator_thresholds())"
    assert run_python(code, STELLAR_FAST_RAISE_MALLOC="0") == "(False, 'switched off by STELLAR_FAST_RAISE_MALLOC=0')"


def test_raised_thresholds_keep_freed_memory_in_the_process() -> None:
    # page faults of allocating, touching and freeing 64 MiB, ten times, after a first time
    code = """
import resource, torch
from stellar_fast import native
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
mapped = faults()
took_effect, reason = native.raise_allocator_thresholds()
faults()
print(faults() < mapped / 5 if took_effect else reason)
"""
    assert run_python(code) in ("True", "the C library is not glibc")


def test_package_works_without_the_native_module() -> None:
    code = """
import sys
sys.modules["stellar_fast._C"] = None  # as if it had not been built
import numpy as np, stellar_fast
from stellar_fast import backend, native
from stellar_fast.ops.crop_resize import crop_resize
assert not native.available() and native.build_info() == {} and not native.raise_allocator_thresholds()[0]
assert native.reason() == "the native module was not built"
rows = {row.backend: row for row in backend.describe() if row.op == "crop_resize"}
assert rows["reference"][:4] == ("crop_resize", "reference", True, "in use")
assert rows["cpu"][:4] == ("crop_resize", "cpu", False, native.reason())
image = np.full((9, 9, 3), 7, np.uint8)
assert (crop_resize(image, [(0, 0, 9, 9)], [False], 4) == 7).all()
try:
    with backend.use_backend("cpu"):
        crop_resize(image, [(0, 0, 9, 9)], [False], 4)
except ValueError as error:
    print(error)
sys.exit(native.main() != 1)
"""
    printed = run_python(code)
    assert "backend 'cpu' was asked for" in printed and "crop_resize can use: reference" in printed
