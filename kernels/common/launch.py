"""The one way a Triton kernel is launched, so that what `stellar-fast inspect` compiles is what runs."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple


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
        kernel[grid](*arguments, **options)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of running them."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before
