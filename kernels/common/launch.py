"""The one way a Triton kernel is launched, so that what `stellar-fast inspect` compiles is what runs."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A launch that was recorded instead of run: `options` holds constexprs by name, num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run ``kernel[grid](*arguments, **options)``; inside `record` only note it, so that tensors may be on "meta"."""
    # Said in every launch: triton 3.10 turns the default around.
    options = {"enable_fp_fusion": True, **options}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, options))
    elif all(grid):
        with _current(arguments):
            kernel[grid](*arguments, **options)


def _current(arguments: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """The tensors' device as the current one, which is where Triton launches."""
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of running them."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before
