// Small products in registers and caches: a few rows at a time against an image's tokens, which are packed once as floats, as rows (token
// k at k * padded(width)) and as columns (element i of token k at i * padded(tokens) + k). Padding is zero, so that packed operands are
// read in whole vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/vec.h"
#include "lowrank_product/lowrank_product.h"

namespace stellar_fast::lowrank {

constexpr int kPad = 16;     // of packed rows and columns: floats of the widest vector
constexpr int kLine = 16;    // floats of a cache line
constexpr int kMaxRows = 8;  // of any level
template <int W>
constexpr int kRows = W == 16 ? kMaxRows : 4;  // at once, by the number of vector registers

inline int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

template <int W>
STELLAR_FAST_INLINE f32v<W> load_some(const float *p, int count) {
  f32v<W> v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

template <int W>
STELLAR_FAST_INLINE f32v<W> load_up_to(const float *p, int count) {
  return count >= W ? load<W>(p) : load_some<W>(p, count);
}

template <int W>
STELLAR_FAST_INLINE void store_up_to(float *p, f32v<W> v, int count) {
  if (count >= W) {
    store<W>(p, v);
  } else {
    std::memcpy(p, &v, count * sizeof(float));
  }
}

// Clang has no shuffle by a vector of lanes, and GCC before 12 none by constants.
#ifdef __clang__
#define STELLAR_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define STELLAR_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i32v<W>{__VA_ARGS__})
#endif

// Transposes W x W: each step swaps the off-diagonal halves of blocks of 2 Step x 2 Step.
template <int W, int Step, int... I>
STELLAR_FAST_INLINE void transpose_step(f32v<W> *v, std::integer_sequence<int, I...>) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & Step) continue;
    const f32v<W> a = v[i], b = v[i + Step];
    v[i] = STELLAR_FAST_SHUFFLE(a, b, (I & Step ? W + (I ^ Step) : I)...);
    v[i + Step] = STELLAR_FAST_SHUFFLE(a, b, (I & Step ? W + I : I ^ Step)...);
  }
}
template <int W, int Step = W / 2>
STELLAR_FAST_INLINE void transpose(f32v<W> *v) {
  transpose_step<W, Step>(v, std::make_integer_sequence<int, W>());
  if constexpr (Step > 1) transpose<W, Step / 2>(v);
}

// Row `row` of an image as floats: where it lies, or converted to `scratch`.
template <int W>
STELLAR_FAST_INLINE const float *float_row(const Matrices &m, int image, int row, int width, float *scratch) {
  const ptrdiff_t offset = image * m.image_stride + row * m.row_stride;
  if (!m.is_bfloat16) return static_cast<const float *>(m.data) + offset;
  const bfloat16 *in = static_cast<const bfloat16 *>(m.data) + offset;
  int i = 0;
  for (; i + W <= width; i += W) store<W>(scratch + i, load<W>(in + i));
  for (; i < width; ++i) scratch[i] = to_float(in[i]);
  return scratch;
}

// Writes a row in the dtype of the tensor whose dense rows start at `out`.
template <int W>
STELLAR_FAST_INLINE void write_row(void *out, bool is_bfloat16, size_t row, int width, const float *from) {
  if (!is_bfloat16) {
    std::memcpy(static_cast<float *>(out) + row * width, from, width * sizeof(float));
    return;
  }
  bfloat16 *to = static_cast<bfloat16 *>(out) + row * width;
  int i = 0;
  for (; i + W <= width; i += W) store<W>(to + i, load<W>(from + i));
  for (; i < width; ++i) from_float(to + i, from[i]);
}

// The tokens' rows as floats: token k at packed + k * padded(width), zeros beyond the width.
template <int W>
STELLAR_FAST_INLINE void pack_rows(const Matrices &m, int image, int tokens, int width, float *packed) {
  for (int k = 0; k < tokens; ++k) {
    float *row = packed + k * padded(width);
    const float *from = float_row<W>(m, image, k, width, row);
    if (from != row) std::memcpy(row, from, width * sizeof(float));
    std::fill(row + width, row + padded(width), 0.0f);
  }
}

// Packed rows, token k times factors[k], as columns: element i of token k at columns[i * padded(tokens) + k], zeros beyond the tokens.
template <int W>
STELLAR_FAST_INLINE void pack_columns(const float *packed, int tokens, int width, const float *factors, float *columns) {
  const int stride = padded(tokens);
  for (int k = 0; k < stride; k += W) {
    for (int i = 0; i < width; i += W) {
      f32v<W> block[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
        const bool inside = k + j < tokens;
        block[j] = inside ? load<W>(packed + (k + j) * padded(width) + i) * (factors ? factors[k + j] : 1.0f) : f32v<W>{};
      }
      transpose<W>(block);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j)
        if (i + j < width) store<W>(columns + (i + j) * stride + k, block[j]);
    }
  }
}

// The kRows rows after those in work, to be fetched meanwhile: without it the processor waits for memory at each new row, and b16's
// forward and backward together take 3.7 instead of 3.1 ms (2 cores of a Zen 5). An address beyond the tensor does no harm.
struct Ahead {
  uintptr_t first;
  ptrdiff_t row_bytes;
  int item_bytes;
  Ahead(const Matrices &m, int image, int row)
      : row_bytes(m.row_stride * (m.is_bfloat16 ? 2 : 4)), item_bytes(m.is_bfloat16 ? 2 : 4) {
    first = reinterpret_cast<uintptr_t>(m.data) + image * m.image_stride * item_bytes + row * row_bytes;
  }
  STELLAR_FAST_INLINE void fetch(int row, int column) const {
    __builtin_prefetch(reinterpret_cast<const void *>(first + row * row_bytes + column * item_bytes), 0, 2);
  }
};

// products (kRows x stride) = rows times columns, N vectors of tokens at a time.
template <int W, int N>
STELLAR_FAST_INLINE void multiply_some(const float *const *rows, int width, const float *columns, int stride, float *products,
                                       const Ahead &ahead) {
  f32v<W> sums[kRows<W>][N] = {};
  for (int start = 0; start < width; start += kLine) {
    for (int r = 0; r < kRows<W>; ++r) ahead.fetch(r, start);
    for (int i = start; i < std::min(start + kLine, width); ++i) {
      f32v<W> column[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) column[n] = load<W>(columns + i * stride + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < kRows<W>; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[r][n] += rows[r][i] * column[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows<W>; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store<W>(products + r * stride + n * W, sums[r][n]);
}
template <int W>
STELLAR_FAST_INLINE void multiply(const float *const *rows, int width, const float *columns, int stride, float *products,
                                  const Ahead &ahead) {
  int k = 0;
  for (; k + 2 * W <= stride; k += 2 * W) multiply_some<W, 2>(rows, width, columns + k, stride, products + k, ahead);
  if (k < stride) multiply_some<W, 1>(rows, width, columns + k, stride, products + k, ahead);
}

// Where `mix` starts from: factors[r] * rows[r], or zero without rows. `ahead` says what to fetch for the next ones.
struct Start {
  const float *const *rows;
  const float *factors;
  const Ahead *ahead;
};

// out[r] = start + sum over tokens of weights[r][k] * packed row k, N vectors of the width at a time.
template <int W, int N, bool kTail>
STELLAR_FAST_INLINE void mix_some(const float *weights, int stride, int tokens, const float *packed, int packed_stride,
                                  const Start &start, float *const *out, int at, int width) {
  f32v<W> sums[kRows<W>][N];
#pragma GCC unroll 8
  for (int r = 0; r < kRows<W>; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      if (start.ahead) start.ahead->fetch(r, at + n * W);
      if (start.rows) {
        const float *row = start.rows[r] + at;
        sums[r][n] = start.factors[r] * (kTail ? load_some<W>(row, width - at) : load<W>(row + n * W));
      } else {
        sums[r][n] = f32v<W>{};
      }
    }
  for (int k = 0; k < tokens; ++k) {
    f32v<W> row[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) row[n] = load<W>(packed + k * packed_stride + at + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < kRows<W>; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sums[r][n] += weights[r * stride + k] * row[n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows<W>; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      if (kTail) {
        store_up_to<W>(out[r] + at, sums[r][n], width - at);
      } else {
        store<W>(out[r] + at + n * W, sums[r][n]);
      }
    }
}
template <int W>
STELLAR_FAST_INLINE void mix(const float *weights, int stride, int tokens, const float *packed, const Start &start,
                             float *const *out, int width) {
  const int step = padded(width);
  int at = 0;
  for (; at + 2 * W <= width; at += 2 * W)
    mix_some<W, 2, false>(weights, stride, tokens, packed, step, start, out, at, width);
  for (; at + W <= width; at += W) mix_some<W, 1, false>(weights, stride, tokens, packed, step, start, out, at, width);
  if (at < width) mix_some<W, 1, true>(weights, stride, tokens, packed, step, start, out, at, width);
}

// sums (stride x padded(width)) += weights^T (rows x stride) times rows of `width`, W tokens by one vector at a time.
template <int W>
STELLAR_FAST_INLINE void accumulate(const float *weights, int stride, int count, const float *rows, ptrdiff_t row_stride, int width,
                                    float *sums) {
  for (int at = 0; at < width; at += W) {
    for (int k = 0; k < stride; k += W) {
      float *to = sums + k * padded(width) + at;
      f32v<W> block[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) block[j] = load<W>(to + j * padded(width));
      for (int r = 0; r < count; ++r) {
        const f32v<W> row = load_up_to<W>(rows + r * row_stride + at, width - at);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) block[j] += weights[r * stride + k + j] * row;
      }
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) store<W>(to + j * padded(width), block[j]);
    }
  }
}

// The larger of two that are not negative, or NaN where either is: their bits order as they do, with NaN above all.
template <int W>
STELLAR_FAST_INLINE f32v<W> maximum_or_nan(f32v<W> a, f32v<W> b) {
  typedef typename Vec<W>::u32 u32;
  return (f32v<W>)((u32)a > (u32)b ? (u32)a : (u32)b);
}

// weights = softmax(logits) over `tokens`; zero in the padding.
template <int W>
STELLAR_FAST_INLINE void softmax(const float *logits, int tokens, int stride, float *weights) {
  i32v<W> lane;
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) lane[j] = j;
  f32v<W> larger = f32v<W>{} - INFINITY;
  for (int k = 0; k < stride; k += W)
    larger = maximum<W>(larger, select<W>(lane < tokens - k, load<W>(logits + k), f32v<W>{} - INFINITY));
  const float largest = maximum_of<W>(larger);
  f32v<W> total = {};
  for (int k = 0; k < stride; k += W) {
    const f32v<W> e = select<W>(lane < tokens - k, exp<W>(load<W>(logits + k) - largest), f32v<W>{});
    total += e;
    store<W>(weights + k, e);
  }
  const float inverse = 1.0f / sum<W>(total);
  for (int k = 0; k < stride; k += W) store<W>(weights + k, load<W>(weights + k) * inverse);
}

template <int W>
STELLAR_FAST_INLINE float sum_of_squares(const float *row, int width) {
  f32v<W> sums[4] = {};
  int i = 0;
  for (; i + 4 * W <= width; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const f32v<W> v = load<W>(row + i + j * W);
      sums[j] += v * v;
    }
  for (; i < width; i += W) {
    const f32v<W> v = load_up_to<W>(row + i, width - i);
    sums[0] += v * v;
  }
  return sum<W>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace stellar_fast::lowrank
