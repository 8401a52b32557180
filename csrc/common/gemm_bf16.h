// gemm.h for bfloat16 operands on processors with AVX512-BF16: an instruction multiplies pairs and adds both products in fp32.
// A word is a pair that follows in the summed dimension: the element of the lower index in the lower half.
#pragma once

#include "common/vec.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define STELLAR_FAST_HAS_BF16_DOT 1
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")

namespace stellar_fast {

typedef uint32_t bf16_pair;

template <int MR, int NV>
STELLAR_FAST_INLINE void gemm_bf16_block(const bf16_pair *a, ptrdiff_t a_row, ptrdiff_t a_column, const bf16_pair *b, ptrdiff_t b_row,
                                         float *c, ptrdiff_t c_row, int depth, bool accumulate) {
  __m512 sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[m][n] = accumulate ? _mm512_loadu_ps(c + m * c_row + n * 16) : _mm512_setzero_ps();
  for (int k = 0; k < depth; ++k) {
    __m512bh right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + k * b_row + n * 16);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[m * a_row + k * a_column]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left, right[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) _mm512_storeu_ps(c + m * c_row + n * 16, sum[m][n]);
}

template <int NV>
STELLAR_FAST_INLINE void gemm_bf16_panel(const bf16_pair *a, ptrdiff_t a_row, ptrdiff_t a_column, const bf16_pair *b, ptrdiff_t b_row,
                                         float *c, ptrdiff_t c_row, int rows, int depth, bool accumulate) {
  int m = 0;
  for (; m + 6 <= rows; m += 6)
    gemm_bf16_block<6, NV>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth, accumulate);
  for (; m + 2 <= rows; m += 2)
    gemm_bf16_block<2, NV>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth, accumulate);
  if (m < rows) gemm_bf16_block<1, NV>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth, accumulate);
}

// C (rows x columns) = A B over `depth` pairs; `columns` is a multiple of 16.
STELLAR_FAST_INLINE void gemm_bf16(const bf16_pair *a, ptrdiff_t a_row, ptrdiff_t a_column, const bf16_pair *b, ptrdiff_t b_row, float *c,
                                   ptrdiff_t c_row, int rows, int columns, int depth, bool accumulate) {
  int n = 0;
  for (; n + 64 <= columns; n += 64) gemm_bf16_panel<4>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth, accumulate);
  const int rest = (columns - n) / 16;
  if (rest == 3) gemm_bf16_panel<3>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth, accumulate);
  if (rest == 2) gemm_bf16_panel<2>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth, accumulate);
  if (rest == 1) gemm_bf16_panel<1>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth, accumulate);
}

}  // namespace stellar_fast

#pragma GCC pop_options

namespace stellar_fast {

inline bool processor_has_bf16_dot() {
  static const bool has = processor_level() == 4 && __builtin_cpu_supports("avx512bf16");
  return has;
}

}  // namespace stellar_fast

#else
#define STELLAR_FAST_HAS_BF16_DOT 0
#endif
