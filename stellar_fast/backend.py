"""Which backends exist here, why others do not, and which one an operator takes.

    reference   plain torch or Pillow: the oracle, works everywhere
    torch       torch's own operator, for the dtype and device at hand
    onednn      oneDNN called past torch's choice of library, on CPUs
    cpu         C++ in stellar_fast._C
    triton      Triton kernels, on NVIDIA GPUs
    cuda        CUDA C++ in stellar_fast._C

Without a request the first backend in an operator's row of OPS that works is taken. A request by `use_backend` or by
the variable STELLAR_FAST_BACKEND (`reference`, or `crop_resize=cpu,...`) is honoured or raises; nothing is swapped.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

from stellar_fast import native

BACKENDS = ("reference", "torch", "onednn", "cpu", "triton", "cuda")

# The backends of each operator, fastest first.
OPS: dict[str, tuple[str, ...]] = {
    "crop_resize": ("cpu", "reference"),
    "koleo": ("reference",),
    "linear": ("onednn", "torch", "reference"),
    "lowrank_product": ("reference",),
    "nearest_code": ("reference",),
    "prototype_cross_entropy": ("reference",),
    "sinkhorn_knopp": ("reference",),
    "token_match": ("reference",),
}

ANY = "*"  # a request for every operator
_requests: ContextVar[dict[str, str] | None] = ContextVar("stellar_fast_backend", default=None)


class Row(NamedTuple):
    """One line of `describe`: `reason` says why it is not available, or that it is the one taken."""

    op: str
    backend: str
    available: bool
    reason: str
    written: bool


@functools.cache
def why_not(backend: str) -> str:
    """Why this machine cannot run `backend` at all; empty where it can."""
    if backend == "cpu":
        return native.reason()
    if backend == "onednn":
        return "" if torch.backends.mkldnn.is_available() else f"torch {torch.__version__} was built without oneDNN"
    if backend in ("triton", "cuda") and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if backend == "cuda":
        if not native.available():
            return native.reason()
        return (
            "" if "cuda_architectures" in native.build_info() else "the native module was built without its CUDA half"
        )
    if backend == "triton":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"triton does not import ({error})"
    return ""


def pick(op: str) -> str:
    """Return the backend that `op` takes now. A compiled function keeps the one of its first call.

    Raises:
        ValueError: the requested backend is unknown, not written for `op`, or does not work here.
    """
    working = [name for name in OPS[op] if not why_not(name)]
    asked = _active_requests()
    wanted = asked.get(op, asked.get(ANY))
    if wanted is None:
        return working[0]
    if wanted not in working:
        reason = why_not(wanted) or f"{op} has no such backend"
        raise ValueError(f"backend {wanted!r} was asked for, but {reason}; {op} can use: {', '.join(working)}")
    return wanted


# What torch.compiler.assume_constant_result sets; calling that here would import the compiler, and with it Triton.
pick._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe() -> list[Row]:
    """One row for each operator and backend: available or why not, and which one is taken."""
    rows = []
    for op, written in OPS.items():
        try:
            taken = pick(op)
        except ValueError as error:
            taken, refused = "", f"; {error}"
        else:
            refused = ""
        for backend in BACKENDS:
            reason = why_not(backend) if backend in written else "not written for this operator"
            text = reason or ("in use" if backend == taken else f"works{refused}")
            rows.append(Row(op, backend, not reason, text, backend in written))
    return rows


@contextlib.contextmanager
def use_backend(backend: str | None = None, **by_op: str) -> Iterator[None]:
    """Ask for a backend in a `with` block: for every operator, or for one as in ``use_backend(crop_resize="cpu")``.

    Raises:
        ValueError: an unknown backend or operator at once; one that does not work here when an operator is called.
    """
    asked = {ANY: backend, **by_op} if backend is not None else by_op
    _check_names(asked)
    token = _requests.set({**_active_requests(), **asked} if backend is None else asked)
    try:
        yield
    finally:
        _requests.reset(token)


def _active_requests() -> dict[str, str]:
    requests = _requests.get()
    return _environment_requests(os.environ.get("STELLAR_FAST_BACKEND", "")) if requests is None else requests


@functools.cache
def _environment_requests(text: str) -> dict[str, str]:
    asked = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        op, _, backend = part.rpartition("=")
        asked[op or ANY] = backend
    _check_names(asked)
    return asked


def _check_names(asked: dict[str, str]) -> None:
    for op, backend in asked.items():
        if op != ANY and op not in OPS:
            raise ValueError(f"unknown operator {op!r}; operators with a choice: {', '.join(OPS)}")
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; backends: {', '.join(BACKENDS)}")
