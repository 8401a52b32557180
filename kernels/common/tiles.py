"""Sizes that the launch knobs of several rooms share. Imports no Triton."""

SHARED_BYTES = 166_912  # what a block can have on sm_80, the smallest of the three


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << (size - 1).bit_length()


def dot_size(size: int) -> int:
    """The same, at least 16: tl.dot's smallest dimension."""
    return max(16, power_of_two(size))
