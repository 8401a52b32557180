"""Launch knobs of token_match's Triton kernels. Letters as in kernel.py.

Registers and spills: `stellar-fast inspect` for sm_80, sm_90 and sm_100 (triton 3.9).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch

from stellar_fast.kernels.common.tiles import power_of_two

# Sums of squared differences that a thread holds, one for every pair of tokens and element of a slice: as many again
# are on their way, and with 64 nothing spills.
SUMS = 64


@dataclass(frozen=True)
class Config:
    """`block_d`: width of the slices that a program takes the tokens in."""

    block_d: int
    num_warps: int


def padded_tokens(K: int) -> int:
    """The power of two that holds an image's tokens, at least 4: below that the compiler has no use for it."""
    return max(4, power_of_two(K))


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """Slices of 128 bytes of fp32 for up to 16 tokens, shorter ones of more tokens, until 8 warps hold their sums.

    `dtype` and `device` make no difference: registers hold fp32, and there is no shared memory to speak of.
    """
    pairs = padded_tokens(shape["K"]) ** 2
    num_warps = 4 if pairs <= 256 else 8
    block_d = max(1, min(32, SUMS * 32 * num_warps // pairs))
    return Config(min(block_d, power_of_two(shape["D"])), num_warps)


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    found = [heuristic(shape, dtype, "cuda")]
    found += [Config(*knobs) for knobs in product((4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16))]
    yield from (config for config in dict.fromkeys(found) if is_valid(config, shape, dtype))


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether the kernels compile, and their sums probably fit in registers."""
    sums = padded_tokens(shape["K"]) ** 2 * config.block_d
    return (
        config.num_warps in (1, 2, 4, 8, 16)
        and 1 <= config.block_d <= power_of_two(shape["D"])
        and config.block_d & (config.block_d - 1) == 0
        and sums <= SUMS * 32 * config.num_warps
    )
