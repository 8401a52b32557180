// A task is an image: its normalised tokens stay in the caches. The same every time for any number of threads, since an image's sums are
// its own and the images' losses are added in order.
#include "koleo/koleo.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace stellar_fast {
namespace {

// What a thread works in: normalised tokens, and either all their products or their gradients.
size_t rows_size(const Koleo &c) { return c.tokens * size_t(pairs_padded(c.width)); }
size_t forward_scratch(const Koleo &c) { return rows_size(c) + size_t(pairs_padded(c.tokens)) * pairs_padded(c.tokens); }
size_t backward_scratch(const Koleo &c) { return 2 * rows_size(c); }

// first + the sum over [0, width) of term(i): of vectors, and of single elements at the end.
template <int W, typename Vectors, typename Single>
STELLAR_FAST_INLINE float sum_over(int width, Vectors vectors, Single single) {
  f32v<W> sums[4]{};  // side by side: one alone would wait for the latency of each addition
  int i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
#pragma GCC unroll 4
    for (int chain = 0; chain < 4; ++chain) sums[chain] += vectors(i + chain * W);
  }
  for (; i + W <= width; i += W) sums[0] += vectors(i);
  float total = sum<W>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < width; ++i) total += single(i);
  return total;
}
#define STELLAR_FAST_TERM [&](int i) __attribute__((always_inline))

// Divides the tokens by their norms, to the last bit: tokens that are nearly equal would have another difference. Where the processor
// multiplies and adds in one rounding, a product with the inverse and its correction are the quotient without a division.
template <int W>
STELLAR_FAST_INLINE void normalise(const Koleo &c, const float *norms, float *row) {
  const int padded = pairs_padded(c.width);
  for (int k = 0; k < c.tokens; ++k, row += padded) {
    const float norm = norms[k], inverse = 1 / norm;
    if (W > 4 && norm < 1e30f) {
      for (int i = 0; i < padded; ++i) {
        const float quotient = row[i] * inverse;
        row[i] = __builtin_fmaf(__builtin_fmaf(-quotient, norm, row[i]), inverse, quotient);
      }
    } else {
      for (int i = 0; i < padded; ++i) row[i] /= norm;
    }
  }
}

template <int W>
STELLAR_FAST_INLINE void forward_image_body(const Koleo &c, int n, float *scratch, double &loss) {
  const int K = c.tokens, D = c.width, padded = pairs_padded(D), stride = pairs_padded(K);
  float *rows = scratch, *products = scratch + rows_size(c);
  float *norm = c.norm + ptrdiff_t(n) * K;
  pack_tokens<W>(c.x, n, 0, K, D, rows);
  for (int k = 0; k < K; ++k) {
    const float *row = rows + k * padded;
    const float length = std::sqrt(sum_over<W>(
        D, STELLAR_FAST_TERM { return load<W>(row + i) * load<W>(row + i); }, STELLAR_FAST_TERM { return row[i] * row[i]; }));
    norm[k] = length <= kKoleoEps ? kKoleoEps : length;
  }
  normalise<W>(c, norm, rows);
  pair_sums<W, Pair::kProduct>(rows, rows, K, D, products, stride);
  for (int k = 0; k < K; ++k) products[k * stride + k] = -std::numeric_limits<float>::infinity();
  int32_t nearest[kKoleoMaxTokens];
  largest_rows<W>(products, K, stride, nearest);
  loss = 0;
  for (int k = 0; k < K; ++k) {
    const float *a = rows + k * padded, *b = rows + nearest[k] * padded;
    const float distance = std::sqrt(sum_over<W>(
        D,
        STELLAR_FAST_TERM {
          const f32v<W> off = (load<W>(a + i) - load<W>(b + i)) + kKoleoEps;
          return off * off;
        },
        STELLAR_FAST_TERM { return ((a[i] - b[i]) + kKoleoEps) * ((a[i] - b[i]) + kKoleoEps); }));
    const float floored = distance < c.min_distance ? c.min_distance : distance;
    loss -= std::log(0.5f * floored + kKoleoEps);
    c.index[ptrdiff_t(n) * K + k] = nearest[k];
    c.distance[ptrdiff_t(n) * K + k] = distance;
  }
}
STELLAR_FAST_BY_LEVEL(forward_image, (const Koleo &c, int n, float *scratch, double &loss), (c, n, scratch, loss))

template <int W, typename T>
STELLAR_FAST_INLINE void backward_image_of(const Koleo &c, int n, float weight, T *out, float *scratch) {
  const int K = c.tokens, D = c.width, padded = pairs_padded(D);
  const ptrdiff_t first = ptrdiff_t(n) * K;
  float *rows = scratch, *grads = scratch + rows_size(c);
  pack_tokens<W>(c.x, n, 0, K, D, rows);
  normalise<W>(c, c.norm + first, rows);
  std::fill(grads, grads + rows_size(c), 0.0f);
  for (int k = 0; k < K; ++k) {
    const float distance = c.distance[first + k];
    if (distance < c.min_distance || distance == 0) continue;
    const float factor = -0.5f * weight / (0.5f * distance + kKoleoEps) / distance;
    const ptrdiff_t nearest = c.index[first + k];
    const float *a = rows + k * padded, *b = rows + nearest * padded;
    float *grad_a = grads + k * padded, *grad_b = grads + nearest * padded;
    for (int i = 0; i < D; i += W) {  // beyond the width too, which nobody reads
      const f32v<W> grad = ((load<W>(a + i) - load<W>(b + i)) + kKoleoEps) * factor;
      store<W>(grad_a + i, load<W>(grad_a + i) + grad);
      store<W>(grad_b + i, load<W>(grad_b + i) - grad);
    }
  }
  for (int k = 0; k < K; ++k) {
    const float *row = rows + k * padded, *grad = grads + k * padded, norm = c.norm[first + k], inverse = 1 / norm;
    const bool clamped = norm == kKoleoEps;  // then the norm has no gradient
    const float along = clamped ? 0 : sum_over<W>(
        D, STELLAR_FAST_TERM { return load<W>(row + i) * load<W>(grad + i); }, STELLAR_FAST_TERM { return row[i] * grad[i]; });
    T *to = out + (first + k) * D;
    int i = 0;
    for (; i + W <= D; i += W) store<W>(to + i, (load<W>(grad + i) - load<W>(row + i) * along) * inverse);
    for (; i < D; ++i) from_float(to + i, (grad[i] - row[i] * along) * inverse);
  }
}

template <int W>
STELLAR_FAST_INLINE void backward_image_body(const Koleo &c, int n, float weight, void *out, float *scratch) {
  if (c.x.is_bfloat16)
    backward_image_of<W>(c, n, weight, static_cast<bfloat16 *>(out), scratch);
  else
    backward_image_of<W>(c, n, weight, static_cast<float *>(out), scratch);
}
STELLAR_FAST_BY_LEVEL(backward_image, (const Koleo &c, int n, float weight, void *out, float *scratch), (c, n, weight, out, scratch))

// Runs task(image, scratch) for every image.
template <typename Task>
void for_images(int images, size_t scratch_size, int threads, Task task) {
  threads = std::max(1, std::min(threads, images));
  const AlignedFloats scratch(threads * scratch_size);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t)
    for (int n = t; n < images; n += threads) task(n, scratch.get() + t * scratch_size);
}

}  // namespace

float koleo_forward(const Koleo &call, int threads) {
  std::vector<double> losses(call.images);
  for_images(call.images, forward_scratch(call), threads, [&](int n, float *scratch) { forward_image(call, n, scratch, losses[n]); });
  double total = 0;
  for (const double loss : losses) total += loss;
  return float(total / (double(call.images) * call.tokens));
}

void koleo_backward(const Koleo &call, float grad_loss, void *grad_x, int threads) {
  const float weight = float(grad_loss / (double(call.images) * call.tokens));
  for_images(call.images, backward_scratch(call), threads,
             [&](int n, float *scratch) { backward_image(call, n, weight, grad_x, scratch); });
}

}  // namespace stellar_fast
