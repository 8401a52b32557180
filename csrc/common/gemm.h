// Small matrix product in registers: C (M x N) = A (M x K) B (K x N), C += with `accumulate`, for operands that fit the caches.
#pragma once

#include "common/vec.h"

namespace stellar_fast {

// One block of MR rows by NV vectors: MR * NV accumulators stay in registers, an element of A is broadcast.
template <int W, int MR, int NV>
STELLAR_FAST_INLINE void gemm_block(const float *a, ptrdiff_t a_row, ptrdiff_t a_column, const float *b, ptrdiff_t b_row, float *c,
                                    ptrdiff_t c_row, int depth, bool accumulate) {
  f32v<W> sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[m][n] = accumulate ? load<W>(c + m * c_row + n * W) : f32v<W>{};
  for (int k = 0; k < depth; ++k) {
    f32v<W> right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = load<W>(b + k * b_row + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const float left = a[m * a_row + k * a_column];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store<W>(c + m * c_row + n * W, sum[m][n]);
}

template <int W, int NV>
STELLAR_FAST_INLINE void gemm_panel(const float *a, ptrdiff_t a_row, ptrdiff_t a_column, const float *b, ptrdiff_t b_row, float *c,
                                    ptrdiff_t c_row, int rows, int depth, bool accumulate) {
  constexpr int MR = W == 16 ? 6 : 4;  // MR * NV + NV + 1 registers of 32 (AVX-512) or 16
  int m = 0;
  for (; m + MR <= rows; m += MR)
    gemm_block<W, MR, NV>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth, accumulate);
  for (; m + 2 <= rows; m += 2)
    gemm_block<W, 2, NV>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth, accumulate);
  if (m < rows) gemm_block<W, 1, NV>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth, accumulate);
}

// `columns` is a multiple of W; element (m, k) of A is a[m * a_row + k * a_column], so that A may be read transposed.
template <int W>
STELLAR_FAST_INLINE void gemm(const float *a, ptrdiff_t a_row, ptrdiff_t a_column, const float *b, ptrdiff_t b_row, float *c,
                              ptrdiff_t c_row, int rows, int columns, int depth, bool accumulate) {
  constexpr int NV = W == 16 ? 4 : 2;
  int n = 0;
  for (; n + NV * W <= columns; n += NV * W) gemm_panel<W, NV>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth, accumulate);
  const int rest = (columns - n) / W;
  if (NV > 3 && rest == 3) gemm_panel<W, 3>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth, accumulate);
  if (NV > 2 && rest == 2) gemm_panel<W, 2>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth, accumulate);
  if (rest == 1) gemm_panel<W, 1>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth, accumulate);
}

}  // namespace stellar_fast
