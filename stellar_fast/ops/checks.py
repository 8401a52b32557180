"""Argument checks and layouts shared by the doors, and what torch is doing around the call."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def check_shapes(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Bind shape letters to sizes and raise where two tensors disagree.

    Args:
        named: argument name -> (tensor, letters), one letter a dimension, e.g. ``query=(query, "BPD")``.

    Returns:
        The size of every letter.

    Raises:
        ValueError: a wrong number of dimensions, a letter with two sizes, tensors on two devices; both are named.
    """
    check_devices(**{name: tensor for name, (tensor, _) in named.items()})
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (tensor, letters) in named.items():
        if tensor.dim() != len(letters):
            raise ValueError(
                f"{name} must have {len(letters)} dimensions ({letters}) but its shape is {tuple(tensor.shape)}"
            )
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{name} has {letter}={size} but {owner[letter]} has {letter}={sizes[letter]}")
            owner.setdefault(letter, name)
    return sizes


def check_devices(**named: Tensor) -> None:
    """Raise ValueError where tensors are on different devices."""
    (first, tensor), *others = named.items()
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(f"{name} is on {other.device} but {first} is on {tensor.device}")


def check_floating(**named: Tensor) -> None:
    """Raise ValueError for a tensor that is not of a floating-point dtype."""
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point but is {tensor.dtype}")


def check_positive(**named: float) -> None:
    """Raise ValueError for a number that is not positive."""
    for name, value in named.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive but is {value}")


def check_out(
    out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, inputs: Mapping[str, Tensor], may_be: str = ""
) -> None:
    """Raise ValueError unless `out` can take a channels-last result of which no gradient is kept.

    It may be the input named `may_be`, and overlap none in any other way.
    """
    check_devices(**inputs, out=out)
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"out must be {dtype} of shape {tuple(shape)} in channels-last memory but is {out.dtype} of shape "
            f"{tuple(out.shape)} and strides {out.stride()}"
        )
    for name, tensor in inputs.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"out is given but {name} needs a gradient")
        same = name == may_be and tensor.data_ptr() == out.data_ptr() and tensor.stride() == out.stride()
        if not same and has_values(out) and has_values(tensor) and _overlap(tensor, out):
            raise ValueError(f"out overlaps {name} in memory")


def _overlap(a: Tensor, b: Tensor) -> bool:
    def end(t: Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr() + (last + 1) * t.element_size()

    return bool(a.numel() and b.numel()) and a.data_ptr() < end(b) and b.data_ptr() < end(a)


def with_dense_rows(x: Tensor) -> Tensor:
    """With the elements of a row next to each other; rows may be strided, but not all at one place."""
    dense = (x.stride(-1) == 1 or x.shape[-1] == 1) and (x.dim() < 2 or x.stride(-2) > 0 or x.shape[-2] <= 1)
    return x if dense else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Images (B, C, H, W), channels innermost in memory; as they lie under torch.func, which has no layouts."""
    return x if _in_functorch() else x.contiguous(memory_format=torch.channels_last)


def values_are_checked(tensor: Tensor) -> bool:
    """Whether to read values: on a CPU; elsewhere it waits for the device, so only under STELLAR_FAST_CHECK=1."""
    return has_values(tensor) and (tensor.device.type == "cpu" or os.environ.get("STELLAR_FAST_CHECK") == "1")


def has_values(tensor: Tensor) -> bool:
    """Whether Python can read values: not while a graph is traced, of meta and fake tensors, under torch.func."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
        or tensor.device.type == "meta"
        or isinstance(tensor, FakeTensor)
        or _in_functorch()
    )


def surely(condition: bool) -> bool:
    """A condition on sizes; False in a trace where sizes that may change decide, so that it serves them all."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products under autocast on this device, None where that is off."""
    if device.type == "meta":  # has none
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives or a transform of torch.func are asked for.

    A registered operator has neither: torch would take zero for the one and refuse the other.
    """
    return forward_ad._current_level >= 0 or _in_functorch()


def is_looked_on(*tensors: Tensor | None) -> bool:
    """Whether a call has to go by torch's dispatcher: a mode, a trace or a transform looks on, or a subclass comes."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or in_forward_mode()
        or any(t is not None and type(t) not in (Tensor, Parameter) for t in tensors)
    )


def may_skip_dispatch(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called without its registered operator: no gradient is kept, and nothing looks on.

    torch's dispatcher costs some 15 us, with cold caches 100: as much as a small image takes.
    """
    keeps = torch.is_grad_enabled()
    return not (
        is_looked_on(*tensors)
        or torch.autograd._profiler_enabled()
        or any(keeps and t is not None and t.requires_grad for t in tensors)
    )


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


_in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a trace is never inside of a transform
