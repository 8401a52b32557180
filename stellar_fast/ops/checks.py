"""Argument checks shared by the doors."""

from torch import Tensor
from torch.autograd import forward_ad


def check_shapes(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Bind shape letters to sizes and raise where two tensors disagree.

    Args:
        named: argument name -> (tensor, letters), one letter a dimension, e.g. ``query=(query, "BPD")``.

    Returns:
        The size of every letter.

    Raises:
        ValueError: a wrong number of dimensions, or a letter with two sizes; both values are named.
    """
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


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are asked for: a registered operator has none, and torch would take zero."""
    return forward_ad._current_level >= 0
