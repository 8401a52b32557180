"""What operators make of a weight once: its parts summed, transformed, laid out anew."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# weight -> {what is made of it: (what it was made from, the result)}
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def from_weight(make: Callable[[Tensor], Tensor], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """make(weight), summed in fp32 and then rounded to `dtype`; kept until the weight changes or is gone.

    A write through `weight.data` is no change that torch counts. Nothing is kept of a weight that learns, which FSDP
    fills anew without a trace, of one made under torch.inference_mode, for which torch counts no changes, nor within a
    CUDA graph, whose replay follows the weight.
    """
    cuda = weight.device.type == "cuda"
    kept = not weight.requires_grad and not weight.is_inference()
    kept = kept and not (cuda and torch.cuda.is_current_stream_capturing())
    state = (weight._version, weight.data_ptr()) if kept else ()
    # another stream might read what this one has yet to write
    key = make, dtype, torch.cuda.current_stream(weight.device).cuda_stream if cuda else 0
    if kept and key in (entries := _made.get(weight, {})) and entries[key][0] == state:
        return entries[key][1]
    made = make(weight.detach().float()).to(dtype)
    if kept:
        _made.setdefault(weight, {})[key] = state, made
    return made


def forget() -> None:
    """Keep nothing of any weight: for who loads weights by a way that is no change to torch."""
    _made.clear()
