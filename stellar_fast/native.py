"""The native module `stellar_fast._C`: whether it is there, what it was built from, and its process-wide switches.

`python -m stellar_fast.native` prints the facts, and what each kernel of the CUDA half needs. It fails where the module
or its CUDA half beside nvcc is missing, and where a kernel keeps in memory what should be in registers.
"""

import functools
import importlib
import os
import shutil
import sys
from types import ModuleType


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    import torch  # noqa: F401  first, so that both share the OpenMP runtime that torch brings

    try:
        return importlib.import_module("stellar_fast._C"), ""
    except ModuleNotFoundError:
        return None, "the native module was not built"
    except ImportError as error:
        return None, f"the native module does not load ({error})"


def available() -> bool:
    """Whether the native module is built and loads."""
    return _load()[0] is not None


def reason() -> str:
    """Why the native module is not available; empty when it is."""
    return _load()[1]


def module() -> ModuleType:
    """Return `stellar_fast._C`; RuntimeError says why it is missing."""
    native, why_not = _load()
    if native is None:
        raise RuntimeError(why_not)
    return native


def build_info() -> dict[str, str | int]:
    """Facts of the native build: compiler, flags, SIMD level in use, OpenMP; with a CUDA half its versions and devices.

    Empty without the native module. `cuda_*` keys exist only where the CUDA half was built.
    """
    native = _load()[0]
    return native.build_info() if native else {}


@functools.cache
def source_hash(op: str) -> str:
    """Of the sources that an operator's C++ was built from; empty where it has none here."""
    native = _load()[0]
    hashes = native.source_hashes().split() if native else []
    return dict(pair.split("=") for pair in hashes).get(op, "")


def openmp_libraries() -> list[str]:
    """Files of the OpenMP runtimes in this process; more than one can oversubscribe the cores. Empty off Linux."""
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    except FileNotFoundError:
        return []
    return sorted(file for file in files if os.path.basename(file).startswith(("libgomp", "libiomp", "libomp")))


def raise_allocator_thresholds() -> tuple[bool, str]:
    """Keep freed memory in this process instead of handing it back to the system after every use (glibc only).

    glibc maps blocks over 32 MiB afresh each time, and the page faults can cost more than the arithmetic on them.
    Trainer and command line call this; importing the package never does. STELLAR_FAST_RAISE_MALLOC=0 switches it off.

    Returns:
        Whether it took effect, and the reason when it did not.
    """
    if os.environ.get("STELLAR_FAST_RAISE_MALLOC", "1") == "0":
        return False, "switched off by STELLAR_FAST_RAISE_MALLOC=0"
    native, why_not = _load()
    if native is None:
        return False, why_not
    why_not = native.raise_allocator_thresholds()
    return why_not is None, why_not or ""


def main() -> int:
    """Print the build facts; return 1 where something that could have been built is missing, or a kernel spills."""
    info = build_info()
    for name, value in info.items():
        print(f"{name:22} {value}")
    for library in openmp_libraries():
        print(f"{'openmp loaded':22} {library}")
    if not info:
        print(f"stellar_fast._C is missing: {reason()}", file=sys.stderr)
    elif shutil.which("nvcc") and "cuda_architectures" not in info:
        print(
            "nvcc is here, but stellar_fast._C has no CUDA half: read the log of pip install -v",
            file=sys.stderr,
        )
    else:
        return _print_kernels() if "cuda_architectures" in info else 0
    return 1


def _print_kernels() -> int:
    """A line for each kernel and architecture of the CUDA half; 1 where one must not ship."""
    from stellar_fast import resources

    try:
        rows = resources.of_native_module()
    except ValueError as error:
        print(f"{'kernels':22} not read: {error}")
        return 0
    print(f"{'kernels':22} {len({(row.op, row.kernel) for row in rows})}")
    for row in rows:
        figures = f"{row.registers:3} registers {row.shared_bytes:6} B shared {row.local_bytes:4} B local"
        print(f"{row.op:22} {row.arch:7} {figures}  {row.kernel}")
    wrong = [f"{row.op} {row.kernel} {row.arch}: {problem}" for row in rows for problem in row.problems]
    print("\n".join(wrong), end="\n" * bool(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
