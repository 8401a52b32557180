// A row is read from memory once: its sum stays in the first-level cache for the mean, the variance and the result.
#include "add_layer_norm/add_layer_norm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "common/vec.h"

namespace stellar_fast {
namespace {

constexpr int kChains = 4;   // sums that run side by side: one alone would wait for the latency of each addition

template <int W>
STELLAR_FAST_INLINE float total_of(const f32v<W> (&sums)[kChains]) {
  return sum<W>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// body(first element of a vector, how many it has, number of the chain) over a row.
template <int W, typename Body>
STELLAR_FAST_INLINE void for_vectors(int width, Body body) {
  int i = 0;
  for (; i + kChains * W <= width; i += kChains * W) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) body(i + chain * W, W, chain);
  }
  for (; i < width; i += W) body(i, std::min(W, width - i), 0);
}
#define STELLAR_FAST_BODY [&](int i, int n, int chain) __attribute__((always_inline))

template <typename T>
STELLAR_FAST_INLINE T *row_of(const Rows &rows, int row) {
  return (T *)rows.data + row * rows.stride;
}

struct Forward {
  int width;
  Rows x, residual;
  const float *weight, *bias;
  float eps;
  void *total;
  Rows normed;
  float *mean, *rstd;
};

// R is void without a residual. `line` holds pad(width) floats.
template <int W, typename X, typename R, typename O>
STELLAR_FAST_INLINE void forward_rows_of(const Forward &f, int first, int last, float *line) {
  typedef f32v<W> F;
  constexpr bool kAdds = !std::is_void_v<R>;
  typedef std::conditional_t<std::is_same_v<X, bfloat16> && std::is_same_v<R, bfloat16>, bfloat16, float> T;
  typedef std::conditional_t<kAdds, R, float> Residual;
  const int width = f.width;
  for (int row = first; row < last; ++row) {
    const X *x = row_of<X>(f.x, row);
    const Residual *residual = row_of<Residual>(f.residual, row);
    T *total = (T *)f.total + (ptrdiff_t)row * width;
    F added[kChains]{};
    for_vectors<W>(width, STELLAR_FAST_BODY {
      F value = load_first<W>(x + i, n);
      if constexpr (kAdds) {
        value += load_first<W>(residual + i, n);
        T rounded[W];
        store<W>(rounded, value);
        value = load<W>(rounded);  // the norm is of the total as it is kept
        store_first<W>(total + i, value, n);
      }
      store<W>(line + i, value);
      added[chain] += value;
    });
    const float mean = total_of<W>(added) / width;
    F squares[kChains]{};
    for_vectors<W>(width, STELLAR_FAST_BODY {
      F off = load<W>(line + i) - mean;
      if (n < W) std::fill((float *)&off + n, (float *)&off + W, 0.0f);
      squares[chain] += off * off;
    });
    const float rstd = 1 / std::sqrt(total_of<W>(squares) / width + f.eps);
    O *normed = row_of<O>(f.normed, row);
    for_vectors<W>(width, STELLAR_FAST_BODY {
      (void)chain;
      store_first<W>(normed + i, (load<W>(line + i) - mean) * rstd * load_first<W>(f.weight + i, n) + load_first<W>(f.bias + i, n), n);
    });
    f.mean[row] = mean;
    f.rstd[row] = rstd;
  }
}

template <int W, typename X, typename R>
STELLAR_FAST_INLINE void forward_rows_to(const Forward &f, int first, int last, float *line) {
  if (f.normed.is_bfloat16)
    forward_rows_of<W, X, R, bfloat16>(f, first, last, line);
  else
    forward_rows_of<W, X, R, float>(f, first, last, line);
}

template <int W, typename X>
STELLAR_FAST_INLINE void forward_rows_from(const Forward &f, int first, int last, float *line) {
  if (!f.residual.data)
    forward_rows_to<W, X, void>(f, first, last, line);
  else if (f.residual.is_bfloat16)
    forward_rows_to<W, X, bfloat16>(f, first, last, line);
  else
    forward_rows_to<W, X, float>(f, first, last, line);
}

template <int W>
STELLAR_FAST_INLINE void forward_rows_body(const Forward &f, int first, int last, float *line) {
  if (f.x.is_bfloat16)
    forward_rows_from<W, bfloat16>(f, first, last, line);
  else
    forward_rows_from<W, float>(f, first, last, line);
}

STELLAR_FAST_BY_LEVEL(forward_rows, (const Forward &f, int first, int last, float *line), (f, first, last, line))

struct Backward {
  int width;
  Rows grad_normed, grad_total, total;
  const float *weight, *mean, *rstd;
  void *grad, *grad_x;
};

// G and T: dtypes of grad_normed and of total. `sums` (2 x pad(width)) are added to.
template <int W, typename G, typename T>
STELLAR_FAST_INLINE void backward_rows_of(const Backward &b, int first, int last, float *sums) {
  typedef f32v<W> F;
  const int width = b.width;
  float *weight_sums = sums, *bias_sums = sums + pad(width);
  for (int row = first; row < last; ++row) {
    const G *grad_normed = row_of<G>(b.grad_normed, row);
    const T *total = row_of<T>(b.total, row);
    const T *grad_total = b.grad_total.data ? row_of<T>(b.grad_total, row) : nullptr;
    const float mean = b.mean[row], rstd = b.rstd[row];
    F added[kChains]{}, along[kChains]{};
    for_vectors<W>(width, STELLAR_FAST_BODY {
      const F g = load_first<W>(grad_normed + i, n);
      const F unit = (load_first<W>(total + i, n) - mean) * rstd;
      const F weighted = g * load_first<W>(b.weight + i, n);
      added[chain] += weighted;
      along[chain] += weighted * unit;
      store<W>(weight_sums + i, load<W>(weight_sums + i) + g * unit);
      store<W>(bias_sums + i, load<W>(bias_sums + i) + g);
    });
    const float shift = total_of<W>(added) / width, slope = total_of<W>(along) / width;
    T *grad = (T *)b.grad + (ptrdiff_t)row * width;
    bfloat16 *grad_x = b.grad_x ? (bfloat16 *)b.grad_x + (ptrdiff_t)row * width : nullptr;
    for_vectors<W>(width, STELLAR_FAST_BODY {
      (void)chain;
      const F unit = (load_first<W>(total + i, n) - mean) * rstd;
      F value = (load_first<W>(grad_normed + i, n) * load_first<W>(b.weight + i, n) - shift - unit * slope) * rstd;
      if (grad_total) value += load_first<W>(grad_total + i, n);
      store_first<W>(grad + i, value, n);
      if (grad_x) store_first<W>(grad_x + i, value, n);
    });
  }
}

template <int W, typename G>
STELLAR_FAST_INLINE void backward_rows_to(const Backward &b, int first, int last, float *sums) {
  if (b.total.is_bfloat16)
    backward_rows_of<W, G, bfloat16>(b, first, last, sums);
  else
    backward_rows_of<W, G, float>(b, first, last, sums);
}

template <int W>
STELLAR_FAST_INLINE void backward_rows_body(const Backward &b, int first, int last, float *sums) {
  if (b.grad_normed.is_bfloat16)
    backward_rows_to<W, bfloat16>(b, first, last, sums);
  else
    backward_rows_to<W, float>(b, first, last, sums);
}

STELLAR_FAST_BY_LEVEL(backward_rows, (const Backward &b, int first, int last, float *sums), (b, first, last, sums))

// First row of a thread's part.
int part(int count, int thread, int threads) { return int((long long)count * thread / threads); }

}  // namespace

void add_layer_norm_forward(int count, int width, Rows x, Rows residual, const float *weight, const float *bias, float eps, void *total,
                            Rows normed, float *mean, float *rstd, int threads) {
  const Forward f{width, x, residual, weight, bias, eps, total, normed, mean, rstd};
  const std::unique_ptr<float[]> lines(new float[(size_t)threads * pad(width)]);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) forward_rows(f, part(count, t, threads), part(count, t + 1, threads), &lines[(size_t)t * pad(width)]);
}

void add_layer_norm_backward(int count, int width, Rows grad_normed, Rows grad_total, Rows total, const float *weight, const float *mean,
                             const float *rstd, void *grad, void *grad_x, float *grad_weight, float *grad_bias, int threads) {
  const Backward b{width, grad_normed, grad_total, total, weight, mean, rstd, grad, grad_x};
  const size_t size = 2 * (size_t)pad(width);
  const std::unique_ptr<float[]> parts(new float[threads * size]());
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) backward_rows(b, part(count, t, threads), part(count, t + 1, threads), &parts[t * size]);
  for (int i = 0; i < width; ++i) {
    grad_weight[i] = grad_bias[i] = 0;
    for (int t = 0; t < threads; ++t) {
      grad_weight[i] += parts[t * size + i];
      grad_bias[i] += parts[t * size + pad(width) + i];
    }
  }
}

}  // namespace stellar_fast
