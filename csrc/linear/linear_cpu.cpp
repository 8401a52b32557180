// The products are oneDNN's; here is what stands between them: the GELU, and transposed copies, with which oneDNN multiplies faster than
// with transposed views.
//
// GELU: with t = |x|, the tail Q(t) = 1 - Phi(t) is exp(-t^2 / 2) R(t), where R, half
// the scaled complementary error function, falls smoothly from 1/2: one polynomial, and the exponential that the gradient's density
// phi needs too. No difference of nearly equal numbers is formed, so small results are as exact as large ones.
#include "linear/linear.h"

#include <algorithm>

#include "common/vec.h"

namespace stellar_fast {
namespace {

constexpr size_t kChunk = 8192;  // elements a task: four arrays of it fit the second-level cache

// Coefficients from the constant upwards; fitted for the least largest error in 40 digits (mpmath), then rounded to float.
template <int W, size_t N>
STELLAR_FAST_INLINE f32v<W> polynomial(const float (&coefficients)[N], f32v<W> x) {
  f32v<W> sum = coefficients[N - 1] * x + coefficients[N - 2];
#pragma GCC unroll 16
  for (int i = int(N) - 3; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// R over [0, 6] in s = t / 3 - 1 (beyond, where Q < 1e-9, R(6) does), and (2^f - 1) / f over [-1/2, 1/2].
template <typename T>
struct Coefficients;

template <>
struct Coefficients<float> {  // relative errors 5e-8 and 2e-9
  static constexpr float kTail[] = {0.121513933f,     -0.103201255f,    0.0824094042f,    -0.0623834915f,  0.0450005345f,
                                    -0.0312127359f,   0.021186294f,     -0.0131871551f,   0.00693682022f,  -0.00573736802f,
                                    0.00549329119f,   -0.000559789187f, -0.00138643465f,  -0.00132839067f, 0.001235954f};
  static constexpr float kExp2[] = {0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843692f, 0.0013398875f, 0.000153533605f};
};

template <>
struct Coefficients<bfloat16> {  // 1e-4 and 3e-6, against the 2e-3 of a rounding
  static constexpr float kTail[] = {0.12155018f,   -0.103280172f, 0.0803973079f,  -0.0626127198f, 0.0600190535f,
                                    -0.0253931861f, -0.0128252767f, -0.0259999856f, 0.0335214399f};
  static constexpr float kExp2[] = {0.693124175f, 0.240240991f, 0.0559064299f, 0.00958285108f};
};

template <int W>
struct Normal {
  f32v<W> cumulative;  // Phi(x)
  f32v<W> bell;        // exp(-x^2 / 2)
};

// To the precision of T.
template <int W, typename T>
STELLAR_FAST_INLINE Normal<W> normal(f32v<W> x) {
  typedef f32v<W> F;
  typedef i32v<W> I;
  typedef typename Vec<W>::u32 U;  // wraps, for a large x whose bell is zero below
  const float half_log2e = -0.721347520f;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

  const F t = (F)((I)x & 0x7fffffff);
  F s = t * 0.333333333f - 1.0f;
  s = s < 1.0f ? s : 1.0f - F{};
  const F square = x * x;
  const F shifted = square * half_log2e + magic;
  const F f = square * half_log2e - (shifted - magic);
  const F power = polynomial<W>(Coefficients<T>::kExp2, f) * f + 1.0f;
  const F bell = (F)((U)power + ((U)shifted << 23));  // the upper bits of the magic number fall out
  Normal<W> out;
  out.bell = select<W>(square > 174.0f, F{}, bell);  // below 2^-126
  const F tail = out.bell * polynomial<W>(Coefficients<T>::kTail, s);
  out.cumulative = x < 0.0f ? tail : 1.0f - tail;
  return out;
}

// What one step of a loop holds: a vector of floats, or two of bfloat16, those at even and at odd places, since a pair of 16 bits comes
// apart and together in its own 32-bit lane.
template <int W, typename T>
struct Step;

template <int W>
struct Step<W, float> {
  static constexpr int kSize = W;
  f32v<W> value[1];
  static STELLAR_FAST_INLINE Step get(const float *p) { return {{load<W>(p)}}; }
  STELLAR_FAST_INLINE void put(float *p) const { store<W>(p, value[0]); }
};

template <int W>
struct Step<W, bfloat16> {
  typedef typename Vec<W>::u32 U;
  static constexpr int kSize = 2 * W;
  f32v<W> value[2];
  static STELLAR_FAST_INLINE Step get(const bfloat16 *p) {
    U pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return {{(f32v<W>)(pairs << 16), (f32v<W>)(pairs & 0xffff0000)}};
  }
  STELLAR_FAST_INLINE void put(bfloat16 *p) const {
    const U pairs = (rounded(value[0]) >> 16) | (rounded(value[1]) & 0xffff0000);
    std::memcpy(p, &pairs, sizeof pairs);
  }
  // To nearest, ties to even, in the upper 16 bits. The lower ones of a NaN are zero here, since those of its source are; it stays one.
  static STELLAR_FAST_INLINE U rounded(f32v<W> x) { return (U)x + 0x7fff + (((U)x >> 16) & 1); }
};

template <int W, typename T>
STELLAR_FAST_INLINE void forward_step(const T *x, T *out) {
  Step<W, T> step = Step<W, T>::get(x);
  for (f32v<W> &value : step.value) value *= normal<W, T>(value).cumulative;
  step.put(out);
}

template <int W, bool kOut, typename T>
STELLAR_FAST_INLINE void backward_step(const T *x, const T *grad, T *grad_x, T *out) {
  Step<W, T> step = Step<W, T>::get(x), slope = Step<W, T>::get(grad);
  for (int i = 0; i < Step<W, T>::kSize / W; ++i) {
    f32v<W> &value = step.value[i];
    const Normal<W> n = normal<W, T>(value);
    slope.value[i] *= value * n.bell * 0.398942280f + n.cumulative;
    value *= n.cumulative;
  }
  slope.put(grad_x);
  if (kOut) step.put(out);
}

template <int W, typename T>
STELLAR_FAST_INLINE void forward(const T *x, T *out, size_t count) {
  constexpr size_t kSize = Step<W, T>::kSize;
  size_t i = 0;
  for (; i + kSize <= count; i += kSize) forward_step<W>(x + i, out + i);
  if (i == count) return;
  T rest[kSize] = {};
  std::copy(x + i, x + count, rest);
  forward_step<W>(rest, rest);
  std::copy(rest, rest + (count - i), out + i);
}

template <int W, bool kOut, typename T>
STELLAR_FAST_INLINE void backward(const T *x, const T *grad, T *grad_x, T *out, size_t count) {
  constexpr size_t kSize = Step<W, T>::kSize;
  size_t i = 0;
  for (; i + kSize <= count; i += kSize) backward_step<W, kOut>(x + i, grad + i, grad_x + i, out + i);
  if (i == count) return;
  T rest[kSize] = {}, rest_grad[kSize] = {}, rest_out[kSize];
  std::copy(x + i, x + count, rest);
  std::copy(grad + i, grad + count, rest_grad);
  backward_step<W, kOut>(rest, rest_grad, rest_grad, rest_out);
  std::copy(rest_grad, rest_grad + (count - i), grad_x + i);
  if (kOut) std::copy(rest_out, rest_out + (count - i), out + i);
}

template <int W, typename T>
STELLAR_FAST_INLINE void backward(const T *x, const T *grad, T *grad_x, T *out, size_t count) {
  out ? backward<W, true>(x, grad, grad_x, out, count) : backward<W, false>(x, grad, grad_x, grad_x, count);
}

template <int W>
STELLAR_FAST_INLINE void forward_chunk_body(const void *x, void *out, size_t first, size_t count, bool is_bfloat16) {
  if (is_bfloat16)
    forward<W>((const bfloat16 *)x + first, (bfloat16 *)out + first, count);
  else
    forward<W>((const float *)x + first, (float *)out + first, count);
}

template <int W>
STELLAR_FAST_INLINE void backward_chunk_body(const void *x, const void *grad, void *grad_x, void *out, size_t first, size_t count,
                                             bool is_bfloat16) {
  if (is_bfloat16)
    backward<W>((const bfloat16 *)x + first, (const bfloat16 *)grad + first, (bfloat16 *)grad_x + first,
                out ? (bfloat16 *)out + first : nullptr, count);
  else
    backward<W>((const float *)x + first, (const float *)grad + first, (float *)grad_x + first, out ? (float *)out + first : nullptr,
                count);
}

STELLAR_FAST_BY_LEVEL(forward_chunk, (const void *x, void *out, size_t first, size_t count, bool is_bfloat16),
                      (x, out, first, count, is_bfloat16))
STELLAR_FAST_BY_LEVEL(backward_chunk,
                      (const void *x, const void *grad, void *grad_x, void *out, size_t first, size_t count, bool is_bfloat16),
                      (x, grad, grad_x, out, first, count, is_bfloat16))

constexpr int kStrip = 16;  // columns that are transposed together: a cache line of floats

// Lanes of (a, b) that give the lower and the upper half of a0 b0 a1 b1 ...
template <int W>
struct Interleaved {
  int32_t lower[W] = {}, upper[W] = {};
  constexpr Interleaved() {
    for (int i = 0; i < W; ++i) {
      lower[i] = i / 2 + i % 2 * W;
      upper[i] = lower[i] + W / 2;
    }
  }
};

// clang knows no shuffle by a variable, nor does it need to be fast there.
template <int W>
STELLAR_FAST_INLINE i32v<W> shuffle(i32v<W> a, i32v<W> b, i32v<W> lanes) {
#ifdef __clang__
  i32v<W> out;
  for (int i = 0; i < W; ++i) out[i] = lanes[i] < W ? a[lanes[i]] : b[lanes[i] - W];
  return out;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

template <int W>
STELLAR_FAST_INLINE i32v<W> load_bits(const float *p) {
  i32v<W> bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

template <int W>
STELLAR_FAST_INLINE i32v<W> load_bits(const bfloat16 *p) {
  typename Vec<W>::u16 half;
  std::memcpy(&half, p, sizeof half);
  return (i32v<W>)widen<W>(half);
}

template <int W, typename T>
STELLAR_FAST_INLINE f32v<W> as_floats(i32v<W> bits) {
  return (f32v<W>)(sizeof(T) == 2 ? bits << 16 : bits);
}

template <int W>
STELLAR_FAST_INLINE void store_bits(float *p, i32v<W> bits) {
  std::memcpy(p, &bits, sizeof bits);
}

template <int W>
STELLAR_FAST_INLINE void store_bits(bfloat16 *p, i32v<W> bits) {
  const typename Vec<W>::u16 half = narrow<W>((typename Vec<W>::u32)bits);
  std::memcpy(p, &half, sizeof half);
}

// Each round interleaves row i with row i + W / 2; after log2(W) of them a W x W block is transposed.
template <int W, typename T, bool kSums>
STELLAR_FAST_INLINE void transpose_block(const T *in, ptrdiff_t stride, T *out, ptrdiff_t out_stride, f32v<W> &sums) {
  static constexpr Interleaved<W> kLanes;
  const i32v<W> lower = load_bits<W>((const float *)kLanes.lower), upper = load_bits<W>((const float *)kLanes.upper);
  i32v<W> rows[W], next[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load_bits<W>(in + i * stride);
  if (kSums) {
    f32v<W> sum = as_floats<W, T>(rows[0]);
#pragma GCC unroll 16
    for (int i = 1; i < W; ++i) sum += as_floats<W, T>(rows[i]);
    sums += sum;
  }
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = shuffle<W>(rows[i], rows[i + W / 2], lower);
      next[2 * i + 1] = shuffle<W>(rows[i], rows[i + W / 2], upper);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store_bits<W>(out + i * out_stride, rows[i]);
}

template <int W, typename T, bool kSums>
STELLAR_FAST_INLINE void transpose_strip_of(const T *in, ptrdiff_t stride, int rows, int columns, T *out, float *sums) {
  int r = 0;
  if (columns == kStrip) {
    f32v<W> sum[kStrip / W] = {};
    for (; r + W <= rows; r += W)
      for (int c = 0; c < kStrip; c += W)
        transpose_block<W, T, kSums>(in + r * stride + c, stride, out + (ptrdiff_t)c * rows + r, rows, sum[c / W]);
    if (kSums)
      for (int c = 0; c < kStrip; ++c) sums[c] += sum[c / W][c % W];
  }
  for (; r < rows; ++r)
    for (int c = 0; c < columns; ++c) {
      const T x = in[r * stride + c];
      out[(ptrdiff_t)c * rows + r] = x;
      if (kSums) sums[c] += to_float(x);
    }
}

template <int W, typename T>
STELLAR_FAST_INLINE void transpose_strip_from(const void *in, ptrdiff_t stride, int rows, int columns, void *out, float *sums, int first) {
  const T *strip = (const T *)in + first;
  T *strip_out = (T *)out + (ptrdiff_t)first * rows;
  const int count = std::min(kStrip, columns - first);
  if (sums)
    transpose_strip_of<W, T, true>(strip, stride, rows, count, strip_out, sums + first);
  else
    transpose_strip_of<W, T, false>(strip, stride, rows, count, strip_out, nullptr);
}

template <int W>
STELLAR_FAST_INLINE void transpose_strip_body(const void *in, ptrdiff_t stride, int rows, int columns, void *out, float *sums, int first,
                                              bool is_bfloat16) {
  if (is_bfloat16)
    transpose_strip_from<W, bfloat16>(in, stride, rows, columns, out, sums, first);
  else
    transpose_strip_from<W, float>(in, stride, rows, columns, out, sums, first);
}

STELLAR_FAST_BY_LEVEL(transpose_strip,
                      (const void *in, ptrdiff_t stride, int rows, int columns, void *out, float *sums, int first, bool is_bfloat16),
                      (in, stride, rows, columns, out, sums, first, is_bfloat16))

}  // namespace

void gelu_forward(const void *x, void *out, size_t count, bool is_bfloat16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < count; i += kChunk) forward_chunk(x, out, i, std::min(kChunk, count - i), is_bfloat16);
}

void gelu_backward(const void *x, const void *grad, void *grad_x, void *out, size_t count, bool is_bfloat16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < count; i += kChunk) backward_chunk(x, grad, grad_x, out, i, std::min(kChunk, count - i), is_bfloat16);
}

void transpose(const void *in, ptrdiff_t stride, int rows, int columns, void *out, float *sums, bool is_bfloat16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int first = 0; first < columns; first += kStrip) transpose_strip(in, stride, rows, columns, out, sums, first, is_bfloat16);
}

}  // namespace stellar_fast
