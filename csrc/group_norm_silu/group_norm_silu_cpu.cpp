// Work is divided into chunks of pixels whose size does not depend on the number of threads, so that no result does. A row, the channels of
// one pixel, is dense; per-channel sums and factors stay in the first-level cache.
#include "group_norm_silu/group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/allocator.h"
#include "common/pairs.h"
#include "common/vec.h"

namespace stellar_fast {
namespace {

constexpr ptrdiff_t kChunkElements = 1 << 16, kFewestRows = 16, kMostRows = 512;  // sums of more rows would lose digits
// Images whose sums are finished before their results are begun, unless one alone is larger: what the first pass has read is then found in
// the caches by the second.
constexpr ptrdiff_t kSlabBytes = 8 << 20;
// An fp32 result from this size on is written past the caches: its beginning has left them anyway before someone reads it, and its lines need
// not be fetched to be written. (1, 128, 256, 256) with statistics takes 1.27 instead of 1.44 ms, and as long as before with a reader's pass.
constexpr size_t kStreamBytes = 32 << 20;

struct Chunks {
  explicit Chunks(const GroupNorm &norm)
      : rows(std::clamp(kChunkElements / norm.channels, kFewestRows, kMostRows)), per_image((norm.pixels + rows - 1) / rows) {}
  ptrdiff_t rows, per_image;
};

struct Chunk {
  ptrdiff_t image, rows, first;  // `first`: element
};

Chunk chunk_at(const GroupNorm &norm, const Chunks &chunks, ptrdiff_t index) {
  const ptrdiff_t image = index / chunks.per_image, row = index % chunks.per_image * chunks.rows;
  return {image, std::min(chunks.rows, norm.pixels - row), (image * norm.pixels + row) * norm.channels};
}

// A thread takes the same chunks in every pass over the images from `first` to `last`, in the second backwards: the latest read first.
template <typename Body>
void for_chunks(const Chunks &chunks, ptrdiff_t first, ptrdiff_t last, bool backwards, int threads, const Body &body) {
  const ptrdiff_t begin = first * chunks.per_image, count = (last - first) * chunks.per_image;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    const ptrdiff_t from = begin + count * t / threads, to = begin + count * (t + 1) / threads;
    for (ptrdiff_t i = from; i < to; ++i) body(backwards ? from + to - 1 - i : i, t);
  }
}

template <typename Body>
void for_slabs(const GroupNorm &norm, size_t itemsize, const Body &body) {
  const ptrdiff_t bytes = norm.pixels * norm.channels * itemsize;
  const ptrdiff_t images = std::max<ptrdiff_t>(1, kSlabBytes / std::max<ptrdiff_t>(bytes, 1));
  for (ptrdiff_t i = 0; i < norm.images; i += images) body(i, std::min(i + images, norm.images));
}

// The processor's own fetching ahead keeps too few lines on their way: with this, and one for writing, the two passes over 33 MB take 1.83
// instead of 1.99 ms, the second alone 1.16 instead of 1.43 (2 cores of a Zen 5); stores past the caches gained no more.
template <int kWrite = 0>
STELLAR_FAST_INLINE void fetch_ahead(const void *at) {
  __builtin_prefetch((const char *)at + 4096, kWrite);
}

// body(first channel of a vector, how many it has) over a row.
template <int W, typename Body>
STELLAR_FAST_INLINE void for_vectors(int channels, Body body) {
  int c = 0;
  for (; c + W <= channels; c += W) body(c, W);
  if (c < channels) body(c, channels - c);
}
#define STELLAR_FAST_BODY [&](int c, int n) __attribute__((always_inline))

// Of three values that of the middle.
template <int W>
STELLAR_FAST_INLINE f32v<W> median(f32v<W> a, f32v<W> b, f32v<W> c) {
  const f32v<W> least = select<W>(a < b, a, b), most = maximum<W>(a, b), rest = select<W>(most < c, most, c);
  return maximum<W>(least, rest);
}

// Sums of a chunk less an origin near the channel's mean: where that is much larger than the deviation, squares as they are would leave
// nothing of the variance. The origin is the median of three rows, so that one outlier does not move it. `lines`: it, the sums and the sums
// of squares, pad(channels) floats each; `totals`: 2 x channels doubles to work in; `out`: sum and sum of squares of each group.
template <int W, typename T>
STELLAR_FAST_INLINE void chunk_sums_of(const GroupNorm &norm, const Chunk &chunk, const void *x_, const void *residual_, void *y_,
                                       float *lines, double *totals, double *out) {
  typedef f32v<W> F;
  const int channels = norm.channels;
  const T *x = (const T *)x_ + chunk.first, *residual = residual_ ? (const T *)residual_ + chunk.first : nullptr;
  T *y = residual ? (T *)y_ + chunk.first : nullptr;
  float *origin = lines, *sums = lines + pad(channels), *squares = sums + pad(channels);
  const ptrdiff_t middle = chunk.rows / 2 * channels, last = (chunk.rows - 1) * channels;
  for_vectors<W>(channels, STELLAR_FAST_BODY {
    F at = median<W>(load_first<W>(x + c, n), load_first<W>(x + middle + c, n), load_first<W>(x + last + c, n));
    if (residual)
      at += median<W>(load_first<W>(residual + c, n), load_first<W>(residual + middle + c, n), load_first<W>(residual + last + c, n));
    store<W>(origin + c, at);
    store<W>(sums + c, F{});
    store<W>(squares + c, F{});
  });
  for (ptrdiff_t row = 0; row < chunk.rows; ++row, x += channels) {
    if (residual) {
      for_vectors<W>(channels, STELLAR_FAST_BODY {
        store_first<W>(y + c, load_first<W>(x + c, n) + load_first<W>(residual + c, n), n);
      });
    }
    const T *from = residual ? y : x;
    for_vectors<W>(channels, STELLAR_FAST_BODY {
      fetch_ahead(from + c);
      const F off = load_first<W>(from + c, n) - load<W>(origin + c);
      store<W>(sums + c, load<W>(sums + c) + off);
      store<W>(squares + c, load<W>(squares + c) + off * off);
    });
    if (residual) residual += channels, y += channels;
  }
  // In doubles, and by channel before by group: loops without a dependency.
  const double rows = chunk.rows;
  for (int c = 0; c < channels; ++c) {
    const double at = origin[c], sum = sums[c];
    totals[2 * c] = rows * at + sum;
    totals[2 * c + 1] = (rows * at + 2 * sum) * at + squares[c];
  }
  const int width = channels / norm.groups;
  for (int group = 0; group < norm.groups; ++group, out += 2) {
    out[0] = out[1] = 0;
    for (int c = 0; c < width; ++c, totals += 2) {
      out[0] += totals[0];
      out[1] += totals[1];
    }
  }
}

template <int W>
STELLAR_FAST_INLINE void chunk_sums_body(const GroupNorm &norm, const Chunk &chunk, const void *x, const void *residual, void *y,
                                         bool is_bfloat16, float *lines, double *totals, double *out) {
  is_bfloat16 ? chunk_sums_of<W, bfloat16>(norm, chunk, x, residual, y, lines, totals, out)
              : chunk_sums_of<W, float>(norm, chunk, x, residual, y, lines, totals, out);
}
STELLAR_FAST_BY_LEVEL(chunk_sums,
                      (const GroupNorm &norm, const Chunk &chunk, const void *x, const void *residual, void *y, bool is_bfloat16,
                       float *lines, double *totals, double *out),
                      (norm, chunk, x, residual, y, is_bfloat16, lines, totals, out))

void statistics(const GroupNorm &norm, const Chunks &chunks, ptrdiff_t first, ptrdiff_t last, const double *parts, float *stats) {
  const double count = double(norm.pixels) * (norm.channels / norm.groups);
  for (ptrdiff_t i = first * norm.groups; i < last * norm.groups; ++i) {
    const double *part = parts + 2 * (i / norm.groups * chunks.per_image * norm.groups + i % norm.groups);
    double sum = 0, square = 0;
    for (ptrdiff_t k = 0; k < chunks.per_image; ++k, part += 2 * norm.groups) {
      sum += part[0];
      square += part[1];
    }
    const double mean = sum / count;
    stats[2 * i] = float(mean);
    stats[2 * i + 1] = float(std::max(square / count - mean * mean, 0.0));
  }
}

// Mean and 1 / deviation of an image's channels, pad(channels) floats each. Squares that overflow are no statistics: NaN, not zeros.
void spread(const GroupNorm &norm, const float *stats, ptrdiff_t image, float *mean, float *rstd) {
  const int width = norm.channels / norm.groups;
  for (int c = 0; c < norm.channels; ++c) {
    const float *at = stats + 2 * (image * norm.groups + c / width);
    mean[c] = at[0];
    rstd[c] = std::isfinite(at[1]) ? 1 / std::sqrt(at[1] + norm.eps) : NAN;
  }
}

// exp(-z) as 2^t. The relative error grows with |z|, from 2e-7 to 1e-6 at 20, where SiLU is 0 or z to as many digits. Two thirds of the
// operations of common/vec.h's exp, with which the forward took 3.2 instead of 1.9 ns for 16 values in the caches (a core of a Zen 5).
template <int W>
STELLAR_FAST_INLINE f32v<W> exp_minus(f32v<W> z) {
  typedef f32v<W> F;
  typedef i32v<W> I;
  const float magic = 12582912.0f + 127;  // adding 1.5 * 2^23 rounds to an integer, here to a biased exponent
  const F least = F{} - 126, most = F{} + 126;
  F t = z * -1.44269504f;
  t = least > t ? least : t;  // NaN stays
  t = most < t ? most : t;
  const F shifted = t + magic, f = t - (shifted - magic);
  const I exponent = (I)shifted;
  F p = f * 1.326472731e-3f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  const F scale = (F)(exponent << 23);
  return p * f * scale + scale;
}

// `lines`: mean, 1 / deviation times weight, and bias of the channels, pad(channels) floats each.
template <int W, typename T, bool kStream>
STELLAR_FAST_INLINE void apply_of(const GroupNorm &norm, const Chunk &chunk, const void *x_, const float *lines, void *out_) {
  typedef f32v<W> F;
  const int channels = norm.channels;
  const T *x = (const T *)x_ + chunk.first;
  T *out = (T *)out_ + chunk.first;
  const float *mean = lines, *scale = mean + pad(channels), *bias = scale + pad(channels);
  for (ptrdiff_t row = 0; row < chunk.rows; ++row, x += channels, out += channels)
    for_vectors<W>(channels, STELLAR_FAST_BODY {
      fetch_ahead(x + c);
      if constexpr (!kStream) fetch_ahead<1>(out + c);
      const F z = (load_first<W>(x + c, n) - load<W>(mean + c)) * load<W>(scale + c) + load<W>(bias + c);
      const F value = z / (1 + exp_minus<W>(z));
      if constexpr (kStream)
        stream<W>(out + c, value);
      else
        store_first<W>(out + c, value, n);
    });
  if constexpr (kStream) finish_streaming();
}

enum class Result { kFloat, kStreamedFloat, kBfloat16 };

template <int W>
STELLAR_FAST_INLINE void apply_body(const GroupNorm &norm, const Chunk &chunk, const void *x, const float *lines, void *out,
                                    Result result) {
  if (result == Result::kBfloat16)
    apply_of<W, bfloat16, false>(norm, chunk, x, lines, out);
  else if (result == Result::kStreamedFloat)
    apply_of<W, float, true>(norm, chunk, x, lines, out);
  else
    apply_of<W, float, false>(norm, chunk, x, lines, out);
}
STELLAR_FAST_BY_LEVEL(apply, (const GroupNorm &norm, const Chunk &chunk, const void *x, const float *lines, void *out, Result result),
                      (norm, chunk, x, lines, out, result))

// Streaming takes whole vectors, and needs them aligned.
Result result_of(const GroupNorm &norm, const void *out, size_t bytes, bool is_bfloat16) {
  if (is_bfloat16) return Result::kBfloat16;
  const bool aligned = (uintptr_t)out % (kWidest * sizeof(float)) == 0 && norm.channels % kWidest == 0;
  return aligned && bytes >= kStreamBytes ? Result::kStreamedFloat : Result::kFloat;
}

struct Backward {
  const GroupNorm &norm;
  const void *grad_out, *grad_y, *x;
  void *grad_x;
  bool is_bfloat16;
};

// Lines of an image's channels, pad(channels) floats each.
enum Line { kMean, kRstd, kWeight, kBias, kShift, kSlope, kLines };

// The normalised value, and the gradient of what follows it: weight, bias and SiLU.
template <int W>
STELLAR_FAST_INLINE void unit_and_grad(f32v<W> x, f32v<W> grad_out, const float *lines, size_t line, f32v<W> &unit, f32v<W> &grad) {
  unit = (x - load<W>(lines + kMean * line)) * load<W>(lines + kRstd * line);
  const f32v<W> z = unit * load<W>(lines + kWeight * line) + load<W>(lines + kBias * line);
  const f32v<W> gate = 1 / (1 + exp_minus<W>(z));
  grad = grad_out * (gate + gate * z * (1 - gate));
}

// Adds up the gradients of weight and bias over a chunk: `sums`, 2 x pad(channels) floats.
template <int W, typename T>
STELLAR_FAST_INLINE void grad_sums_of(const Backward &b, const Chunk &chunk, const float *lines, float *sums) {
  const int channels = b.norm.channels;
  const size_t line = pad(channels);
  const T *x = (const T *)b.x + chunk.first, *grad_out = (const T *)b.grad_out + chunk.first;
  std::fill(sums, sums + 2 * line, 0.0f);
  for (ptrdiff_t row = 0; row < chunk.rows; ++row, x += channels, grad_out += channels)
    for_vectors<W>(channels, STELLAR_FAST_BODY {
      fetch_ahead(x + c);
      fetch_ahead(grad_out + c);
      f32v<W> unit, grad;
      unit_and_grad<W>(load_first<W>(x + c, n), load_first<W>(grad_out + c, n), lines + c, line, unit, grad);
      store<W>(sums + c, load<W>(sums + c) + grad * unit);
      store<W>(sums + line + c, load<W>(sums + line + c) + grad);
    });
}

template <int W>
STELLAR_FAST_INLINE void grad_sums_body(const Backward &b, const Chunk &chunk, const float *lines, float *sums) {
  b.is_bfloat16 ? grad_sums_of<W, bfloat16>(b, chunk, lines, sums) : grad_sums_of<W, float>(b, chunk, lines, sums);
}
STELLAR_FAST_BY_LEVEL(grad_sums, (const Backward &b, const Chunk &chunk, const float *lines, float *sums), (b, chunk, lines, sums))

template <int W, typename T>
STELLAR_FAST_INLINE void grad_x_of(const Backward &b, const Chunk &chunk, const float *lines) {
  typedef f32v<W> F;
  const int channels = b.norm.channels;
  const size_t line = pad(channels);
  const T *x = (const T *)b.x, *grad_out = (const T *)b.grad_out, *grad_y = (const T *)b.grad_y;
  ptrdiff_t at = chunk.first;
  for (ptrdiff_t row = 0; row < chunk.rows; ++row, at += channels)
    for_vectors<W>(channels, STELLAR_FAST_BODY {
      fetch_ahead(x + at + c);
      fetch_ahead(grad_out + at + c);
      fetch_ahead<1>((T *)b.grad_x + at + c);
      F unit, grad;
      unit_and_grad<W>(load_first<W>(x + at + c, n), load_first<W>(grad_out + at + c, n), lines + c, line, unit, grad);
      F value = (grad * load<W>(lines + kWeight * line + c) - load<W>(lines + kShift * line + c) -
                 unit * load<W>(lines + kSlope * line + c)) *
                load<W>(lines + kRstd * line + c);
      if (grad_y) value += load_first<W>(grad_y + at + c, n);
      store_first<W>((T *)b.grad_x + at + c, value, n);
    });
}

template <int W>
STELLAR_FAST_INLINE void grad_x_body(const Backward &b, const Chunk &chunk, const float *lines) {
  b.is_bfloat16 ? grad_x_of<W, bfloat16>(b, chunk, lines) : grad_x_of<W, float>(b, chunk, lines);
}
STELLAR_FAST_BY_LEVEL(grad_x, (const Backward &b, const Chunk &chunk, const float *lines), (b, chunk, lines))

// From the sums of an image's chunks: its part of grad_weight and grad_bias (`totals`, 2 x pad(channels) doubles), and its lines for grad_x,
// the means over a group of the gradient of the normalised value, and of its product with that value.
void finish_image(const GroupNorm &norm, ptrdiff_t chunks, const float *sums, double *totals, float *lines) {
  const size_t line = pad(norm.channels);
  const int width = norm.channels / norm.groups;
  const double count = double(norm.pixels) * width;
  std::vector<double> added(2 * line);
  for (ptrdiff_t k = 0; k < chunks; ++k, sums += 2 * line)
    for (size_t i = 0; i < 2 * line; ++i) added[i] += sums[i];
  for (size_t i = 0; i < 2 * line; ++i) totals[i] += added[i];
  for (int first = 0; first < norm.channels; first += width) {
    double shift = 0, slope = 0;
    for (int c = first; c < first + width; ++c) {
      slope += norm.weight[c] * added[c];
      shift += norm.weight[c] * added[line + c];
    }
    std::fill_n(lines + kShift * line + first, width, float(shift / count));
    std::fill_n(lines + kSlope * line + first, width, float(slope / count));
  }
}

size_t itemsize(bool is_bfloat16) { return is_bfloat16 ? sizeof(bfloat16) : sizeof(float); }

}  // namespace

void group_norm_silu_forward(const GroupNorm &norm, const void *x, const void *residual, void *y, float *stats, bool given, void *out,
                             bool is_bfloat16, int threads) {
  const Chunks chunks(norm);
  const size_t size = itemsize(is_bfloat16), bytes = norm.images * norm.pixels * norm.channels * size, line = pad(norm.channels);
  const Result result = result_of(norm, out, bytes, is_bfloat16);
  expect_first_write(out, bytes);
  if (residual) expect_first_write(y, bytes);
  const AlignedFloats lines(3 * line * norm.images), sums(given ? 0 : 3 * line * threads);
  std::vector<double> totals(given ? 0 : 2 * line * threads), parts(given ? 0 : 2 * norm.groups * norm.images * chunks.per_image);
  for_slabs(norm, size, [&](ptrdiff_t first, ptrdiff_t last) {
    if (!given) {
      for_chunks(chunks, first, last, false, threads, [&](ptrdiff_t i, int thread) {
        const Chunk chunk = chunk_at(norm, chunks, i);
        float *of_thread = sums.get() + 3 * line * thread;
        chunk_sums(norm, chunk, x, residual, y, is_bfloat16, of_thread, &totals[2 * line * thread], &parts[2 * norm.groups * i]);
      });
      statistics(norm, chunks, first, last, parts.data(), stats);
    }
    for (ptrdiff_t image = first; image < last; ++image) {
      float *mean = lines.get() + 3 * line * image, *scale = mean + line;
      std::fill_n(mean, 3 * line, 0.0f);
      spread(norm, stats, image, mean, scale);
      for (int c = 0; c < norm.channels; ++c) scale[c] *= norm.weight[c];
      std::copy_n(norm.bias, norm.channels, scale + line);
    }
    for_chunks(chunks, first, last, true, threads, [&](ptrdiff_t i, int) {
      const Chunk chunk = chunk_at(norm, chunks, i);
      apply(norm, chunk, residual ? y : x, lines.get() + 3 * line * chunk.image, out, result);
    });
  });
}

void group_norm_silu_backward(const GroupNorm &norm, const float *stats, const void *grad_out, const void *grad_y, const void *x,
                              void *grad_x_out, float *grad_weight, float *grad_bias, bool is_bfloat16, int threads) {
  const Backward b{norm, grad_out, grad_y, x, grad_x_out, is_bfloat16};
  const Chunks chunks(norm);
  const size_t size = itemsize(is_bfloat16), line = pad(norm.channels);
  expect_first_write(grad_x_out, norm.images * norm.pixels * norm.channels * size);
  const AlignedFloats lines(kLines * line * norm.images), sums(2 * line * norm.images * chunks.per_image);
  std::vector<double> totals(2 * line);
  for_slabs(norm, 2 * size, [&](ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t image = first; image < last; ++image) {
      float *of = lines.get() + kLines * line * image;
      std::fill_n(of, kLines * line, 0.0f);
      spread(norm, stats, image, of + kMean * line, of + kRstd * line);
      std::copy_n(norm.weight, norm.channels, of + kWeight * line);
      std::copy_n(norm.bias, norm.channels, of + kBias * line);
    }
    for_chunks(chunks, first, last, false, threads, [&](ptrdiff_t i, int) {
      const Chunk chunk = chunk_at(norm, chunks, i);
      grad_sums(b, chunk, lines.get() + kLines * line * chunk.image, sums.get() + 2 * line * i);
    });
    for (ptrdiff_t image = first; image < last; ++image)
      finish_image(norm, chunks.per_image, sums.get() + 2 * line * image * chunks.per_image, totals.data(),
                   lines.get() + kLines * line * image);
    for_chunks(chunks, first, last, true, threads, [&](ptrdiff_t i, int) {
      const Chunk chunk = chunk_at(norm, chunks, i);
      grad_x(b, chunk, lines.get() + kLines * line * chunk.image);
    });
  });
  for (int c = 0; c < norm.channels; ++c) {
    grad_weight[c] = float(totals[c]);
    grad_bias[c] = float(totals[line + c]);
  }
}

}  // namespace stellar_fast
