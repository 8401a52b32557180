"""The end of a Triton kernel's loop, where only its launch knows the number of rounds."""

import triton
import triton.language as tl

from stellar_fast.kernels.common.tl_dot import INTERPRETED


@triton.jit
def loop_end(count: tl.tensor):
    """`count` as `range` takes it: beside numpy 2.4 triton 3.6's interpreter makes no integer of a kernel's argument.

    A `while` loop would need none, but only a `for` loop is pipelined.
    """
    return count.handle.data.item() if INTERPRETED else count
