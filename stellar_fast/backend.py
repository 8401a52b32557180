"""Which backends exist here, why others do not, and which one an operator takes.

    reference    plain torch or Pillow: the oracle, works everywhere
    torch        torch's own operator, for the dtype and device at hand
    onednn       oneDNN called past torch's choice of library, on CPUs
    cpu          C++ in stellar_fast._C, on CPUs
    triton       Triton kernels, on NVIDIA GPUs (on CPUs when asked for under TRITON_INTERPRET=1)
    cuda         CUDA C++ in stellar_fast._C, on NVIDIA GPUs
    flash_attn   the flash-attn package, on NVIDIA GPUs
    xformers     the xformers package, on NVIDIA GPUs

Without a request the first backend in an operator's row of OPS that works on the tensors' device and takes their
shapes and dtypes runs. A request by `use_backend` or by the variable STELLAR_FAST_BACKEND (`reference`, or
`crop_resize=cpu,...`) is honoured or raises; nothing is swapped.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

from stellar_fast import native

BACKENDS = ("reference", "torch", "onednn", "cpu", "triton", "cuda", "flash_attn", "xformers")
DEVICES = {
    "onednn": ("cpu",),
    "cpu": ("cpu",),
    "triton": ("cuda",),
    "cuda": ("cuda",),
    "flash_attn": ("cuda",),
    "xformers": ("cuda",),
}  # the others run on any

# The backends of each operator, fastest first.
OPS: dict[str, tuple[str, ...]] = {
    "add_layer_norm": ("triton", "cpu", "torch", "reference"),
    "conv3x3": ("cpu", "torch", "reference"),
    "crop_resize": ("cpu", "reference"),
    "group_norm_silu": ("cuda", "cpu", "torch", "reference"),
    "koleo": ("triton", "cpu", "reference"),
    "linear": ("onednn", "torch", "reference"),
    "lowrank_product": ("triton", "cpu", "reference"),
    "nearest_code": ("cuda", "cpu", "reference"),
    "packed_patch_embed": ("triton", "torch", "reference"),
    "patch_unembed": ("cuda", "cpu", "torch", "reference"),
    "prototype_cross_entropy": ("triton", "cpu", "reference"),
    "sinkhorn": ("triton", "cpu", "reference"),
    "token_attention": ("triton", "cpu", "torch", "flash_attn", "xformers", "reference"),
    "token_match": ("triton", "cpu", "reference"),
    "upsample_conv2x": ("cuda", "cpu", "torch", "reference"),
}

ANY = "*"  # a request for every operator
_seen: set[tuple[str, str]] | None = None
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
    needs_gpu = backend in ("cuda", "flash_attn", "xformers") or (backend == "triton" and not interpreting())
    if needs_gpu and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if backend == "cuda":
        if not native.available():
            return native.reason()
        return (
            "" if "cuda_architectures" in native.build_info() else "the native module was built without its CUDA half"
        )
    if backend in ("triton", "flash_attn", "xformers"):
        try:
            importlib.import_module(backend)
        except Exception as error:  # a package built for another torch may raise anything
            return f"{backend} does not import ({error})"
    return ""


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def pick(op: str, device: str = "cpu", unfit: tuple[tuple[str, str], ...] = ()) -> str:
    """Return the backend that `op` takes now. A compiled function keeps the one of its first call.

    Args:
        op: a row of OPS.
        device: type of the device that the tensors are on, "cpu" or "cuda".
        unfit: (backend, reason) of those that cannot take this call's shapes or dtypes.

    Raises:
        ValueError: the requested backend is unknown, not written for `op`, does not work here or not for this call.
    """
    wanted = requested(op)
    working = [name for name in OPS[op] if not refusal(name, device, unfit)]
    if wanted is None:
        return next(name for name in working if name != "triton" or device != "cpu")
    if wanted not in working:
        reason = f"{op} has no such backend"
        if wanted in OPS[op] or why_not(wanted):
            reason = refusal(wanted, device, unfit)
        raise ValueError(f"backend {wanted!r} was asked for, but {reason}; {op} can use: {', '.join(working)}")
    return wanted


def requested(op: str) -> str | None:
    """The backend that was asked for `op`, or None where the choice is ours."""
    asked = _active_requests()
    return asked.get(op, asked.get(ANY))


def refusal(backend: str, device: str, unfit: tuple[tuple[str, str], ...] = ()) -> str:
    """Why `backend` cannot take a call on tensors of `device`; empty where it can."""
    if reason := why_not(backend):
        return reason
    if device not in DEVICES.get(backend, (device,)) and not (backend == "triton" and interpreting()):
        return f"it does not run on {device} tensors"
    return dict(unfit).get(backend, "")


# What torch.compiler.assume_constant_result sets; calling that here would import the compiler, and with it Triton.
pick._dynamo_marked_constant = requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


def ran(op: str, backend: str) -> None:
    """Called where `backend` computes `op`, so that `observe` can tell what really ran."""
    if _seen is not None:
        _seen.add((op, backend))


@contextlib.contextmanager
def observe() -> Iterator[set[tuple[str, str]]]:
    """Collect (operator, backend) of what is computed in the block by this package's own kernels."""
    global _seen
    before, _seen = _seen, set()
    try:
        yield _seen
    finally:
        _seen = before


def describe() -> list[Row]:
    """One row for each operator and backend: available or why not, and which one is taken on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op, written in OPS.items():
        try:
            taken = pick(op, device)
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
