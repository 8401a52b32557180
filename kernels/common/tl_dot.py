"""Matrix product for Triton kernels, on tensor cores and right under the interpreter too."""

import triton
import triton.language as tl

# The interpreter multiplies bf16 wrongly (triton 3.6 to 3.9: errors of 1e8), so there operands are widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """``acc + a b`` in fp32: 16-bit operands directly, fp32 ones as three tf32 products (close to fp32)."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")
