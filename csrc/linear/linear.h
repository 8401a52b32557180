#pragma once

#include <cstddef>

namespace stellar_fast {

// GELU, x Phi(x) with the exact normal distribution function Phi, of `count` elements (bfloat16 or float). All arrays are
// contiguous; `out` may be `x`.
void gelu_forward(const void *x, void *out, size_t count, bool is_bfloat16, int threads);

// grad_x = grad (Phi(x) + x phi(x)), and gelu(x) again where `out` is not null, both in one pass. `grad_x` may be `grad`.
void gelu_backward(const void *x, const void *grad, void *grad_x, void *out, size_t count, bool is_bfloat16, int threads);

// out (columns x rows, dense) is the transpose of `in` (rows x columns, `stride` elements from one row to the next).
// Where `sums` (columns) is not null, the sum of each column of `in` is added to it.
void transpose(const void *in, ptrdiff_t stride, int rows, int columns, void *out, float *sums, bool is_bfloat16, int threads);

}  // namespace stellar_fast
