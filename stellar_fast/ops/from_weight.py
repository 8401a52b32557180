"""What operators make of a frozen weight and keep: its parts summed, transformed, laid out anew."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage

from stellar_fast import native


@dataclass(frozen=True, eq=False)
class _Entry:
    made: Tensor
    source: tuple[object, ...]  # what it was made from


# memory of weights -> {what is made of what lies there: _Entry}; a weight that is held weakly could not be swapped
_made: WeakKeyDictionary[UntypedStorage, dict[object, _Entry]] = WeakKeyDictionary()
_up_to_date: ContextVar[set[_Entry] | None] = ContextVar("up_to_date", default=None)


def from_weight(make: Callable[..., Tensor], weight: Tensor, dtype: torch.dtype, *how: object) -> Tensor:
    """make(weight, *how), in fp32 and then rounded to `dtype`; on a CPU kept until the weight changes or is gone.

    A change is one of its bytes, whoever writes them and however: they are all read at each call (3 ms for 100 MB on
    two cores, a quarter of what laying them out takes), but within `weights_at_rest` once. Nothing is kept of a weight
    that learns, and on a GPU, where reading would wait for the device.
    """
    # the native module reads them, in the order in which they lie in memory
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if weight.device.type != "cpu" or weight.requires_grad or not dense or not native.available():
        return make(weight.detach().float(), *how).to(dtype)
    key, checked = (make, dtype, weight.storage_offset(), *how), _up_to_date.get()
    entries = _made.setdefault(weight.untyped_storage(), {})
    entry = entries.get(key)
    if entry is None or checked is None or entry not in checked:
        source = weight.dtype, weight.shape, weight.stride(), _fingerprint(weight)
        if entry is None or entry.source != source:
            entry = entries[key] = _Entry(make(weight.detach().float(), *how).to(dtype), source)
        if checked is not None:
            checked.add(entry)
    return entry.made


@contextlib.contextmanager
def weights_at_rest() -> Iterator[None]:
    """A block in which nobody writes weights: for who passes many inputs through one network."""
    if torch.compiler.is_compiling():  # a graph keeps nothing
        yield
        return
    token = _up_to_date.set(set())
    try:
        yield
    finally:
        _up_to_date.reset(token)


def _fingerprint(weight: Tensor) -> int:
    size = weight.numel() * weight.element_size()
    return native.module().fingerprint(weight.data_ptr(), size, torch.get_num_threads())
