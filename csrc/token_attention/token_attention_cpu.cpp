#include "token_attention/token_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "common/gemm.h"
#include "common/gemm_bf16.h"
#include "common/vec.h"

namespace stellar_fast {
namespace {

constexpr int PAD = 16;         // widths of all scratch matrices are multiples of the widest vector
constexpr int QUERY_BLOCK = 48;  // rows of scores at once: 48 x 213 and their gradients stay in a second-level cache of 512 KiB

int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

constexpr size_t KEPT_FLOATS = 8 << 18;  // 8 MiB: enough for 4000 keys of 64 channels, backward too

// Scratch of one thread, kept for the next call: a fresh one would pay for its page faults again. Long sequences take more than KEPT_FLOATS,
// which goes back after the call.
class Workspace {
 public:
  float *take(size_t count) {
    const size_t at = used_;
    used_ += (count + PAD - 1) / PAD * PAD;
    return used_ <= data_.size() ? data_.data() + at : nullptr;
  }
  void reserve(size_t count) {
    if (count > data_.size()) data_.resize(count);
    used_ = 0;
  }
  void finish() {
    if (data_.size() > KEPT_FLOATS) std::vector<float>().swap(data_);
  }

 private:
  std::vector<float> data_;
  size_t used_ = 0;
};

struct Task {
  const AttentionShape *shape;
  int first_q, rows_q, first_k, rows_k, head;
};

template <typename T>
STELLAR_FAST_INLINE T *row_of(const Heads &x, int row, int head) {
  return static_cast<T *>(x.data) + row * x.row_stride + head * x.head_stride;
}

// Rows as floats times `factor`, (rows, width) with zeros up to the padded width.
template <int W, typename T>
STELLAR_FAST_INLINE void pack(const Heads &x, int first, int rows, int head, int width, float factor, float *to, int to_row) {
  for (int r = 0; r < rows; ++r) {
    const T *from = row_of<const T>(x, first + r, head);
    float *out = to + (size_t)r * to_row;
    int c = 0;
    for (; c + W <= width; c += W) store<W>(out + c, load<W>(from + c) * factor);
    for (; c < width; ++c) out[c] = to_float(from[c]) * factor;
    for (; c < to_row; ++c) out[c] = 0;
  }
}

// Rows as columns, (width, padded rows) with zeros in the padding. Source (rows, width) of floats.
template <int W>
STELLAR_FAST_INLINE void transpose(const float *from, int from_row, int rows, int width, float *to, int to_row) {
  for (int c = 0; c < width; c += 4) {
    float *out[4];
    const int columns = std::min(4, width - c);
    for (int j = 0; j < 4; ++j) out[j] = to + (size_t)(c + std::min(j, columns - 1)) * to_row;
    if (columns == 4) {
      for (int r = 0; r < rows; ++r) {
        const float *in = from + (size_t)r * from_row + c;
        out[0][r] = in[0], out[1][r] = in[1], out[2][r] = in[2], out[3][r] = in[3];
      }
    } else {
      for (int j = 0; j < columns; ++j)
        for (int r = 0; r < rows; ++r) out[j][r] = from[(size_t)r * from_row + c + j];
    }
    for (int j = 0; j < columns; ++j)
      for (int r = rows; r < to_row; ++r) out[j][r] = 0;
  }
}

template <int W, typename T>
STELLAR_FAST_INLINE void unpack(const float *from, int from_row, const Heads &x, int first, int rows, int head, int width) {
  for (int r = 0; r < rows; ++r) {
    T *to = row_of<T>(x, first + r, head);
    const float *in = from + (size_t)r * from_row;
    int c = 0;
    for (; c + W <= width; c += W) store<W>(to + c, load<W>(in + c));
    for (; c < width; ++c) from_float(to + c, in[c]);
  }
}

// Scores of a row to exponentials less their maximum; returns their sum; `top` gets the maximum unless null. Padding becomes zero.
template <int W>
STELLAR_FAST_INLINE float softmax_row(float *scores, int count, int count_padded, float *top) {
  for (int j = count; j < count_padded; ++j) scores[j] = -std::numeric_limits<float>::infinity();
  f32v<W> best = load<W>(scores);
  for (int j = W; j < count_padded; j += W) best = maximum<W>(best, load<W>(scores + j));
  const float largest = maximum_of<W>(best);
  if (top) *top = largest;
  f32v<W> total{};
  for (int j = 0; j < count_padded; j += W) {
    const f32v<W> e = exp<W>(load<W>(scores + j) - largest);
    store<W>(scores + j, e);
    total += e;
  }
  return sum<W>(total);
}

template <int W, typename T>
STELLAR_FAST_INLINE void forward_task(const Task &t, const Heads &q, const Heads &k, const Heads &v, const Heads &out, float *lse,
                                      Workspace &space) {
  const int d = t.shape->head_dim, dp = padded(d), lk = t.rows_k, lkp = padded(lk);
  space.reserve((size_t)2 * lk * dp + (size_t)d * lkp + (size_t)QUERY_BLOCK * (2 * dp + lkp) + 8 * PAD);
  float *keys = space.take((size_t)lk * dp), *values = space.take((size_t)lk * dp), *keys_t = space.take((size_t)d * lkp);
  float *queries = space.take((size_t)QUERY_BLOCK * dp), *result = space.take((size_t)QUERY_BLOCK * dp);
  float *scores = space.take((size_t)QUERY_BLOCK * lkp);
  pack<W, T>(k, t.first_k, lk, t.head, d, 1.0f, keys, dp);
  pack<W, T>(v, t.first_k, lk, t.head, d, 1.0f, values, dp);
  transpose<W>(keys, dp, lk, d, keys_t, lkp);
  for (int start = 0; start < t.rows_q; start += QUERY_BLOCK) {
    const int rows = std::min(QUERY_BLOCK, t.rows_q - start), first = t.first_q + start;
    pack<W, T>(q, first, rows, t.head, d, t.shape->scale, queries, dp);
    gemm<W>(queries, dp, 1, keys_t, lkp, scores, lkp, rows, lkp, d, false);
    float inverse[QUERY_BLOCK];
    for (int r = 0; r < rows; ++r) {
      float top;
      float *row = scores + (size_t)r * lkp;
      const float total = lk ? softmax_row<W>(row, lk, lkp, &top) : 0.0f;
      lse[first + r] = lk ? top + std::log(total) : -std::numeric_limits<float>::infinity();
      inverse[r] = lk ? 1.0f / total : 0.0f;
    }
    gemm<W>(scores, lkp, 1, values, dp, result, dp, rows, dp, lk, false);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < dp; c += W) store<W>(result + (size_t)r * dp + c, load<W>(result + (size_t)r * dp + c) * inverse[r]);
    unpack<W, T>(result, dp, out, first, rows, t.head, d);
  }
}

template <int W, typename T>
STELLAR_FAST_INLINE void backward_task(const Task &t, const Heads &grad_out, const Heads &q, const Heads &k, const Heads &v,
                                       const Heads &grad_q, const Heads &grad_k, const Heads &grad_v, Workspace &space) {
  const int d = t.shape->head_dim, dp = padded(d), lk = t.rows_k, lkp = padded(lk);
  const size_t wide = (size_t)lk * dp, tall = (size_t)d * lkp, block = (size_t)QUERY_BLOCK * dp;
  space.reserve(4 * wide + 2 * tall + 3 * block + (size_t)2 * QUERY_BLOCK * lkp + 16 * PAD);
  float *keys = space.take(wide), *values = space.take(wide), *d_keys = space.take(wide), *d_values = space.take(wide);
  float *keys_t = space.take(tall), *values_t = space.take(tall);
  float *queries = space.take(block), *d_out = space.take(block), *d_queries = space.take(block);
  float *weights = space.take((size_t)QUERY_BLOCK * lkp), *d_scores = space.take((size_t)QUERY_BLOCK * lkp);
  pack<W, T>(k, t.first_k, lk, t.head, d, 1.0f, keys, dp);
  pack<W, T>(v, t.first_k, lk, t.head, d, 1.0f, values, dp);
  transpose<W>(keys, dp, lk, d, keys_t, lkp);
  transpose<W>(values, dp, lk, d, values_t, lkp);
  if (!t.rows_q) std::fill_n(d_keys, wide, 0.0f), std::fill_n(d_values, wide, 0.0f);
  for (int start = 0; start < t.rows_q; start += QUERY_BLOCK) {
    const int rows = std::min(QUERY_BLOCK, t.rows_q - start), first = t.first_q + start;
    const float scale = t.shape->scale;
    pack<W, T>(q, first, rows, t.head, d, scale, queries, dp);
    pack<W, T>(grad_out, first, rows, t.head, d, 1.0f, d_out, dp);
    gemm<W>(queries, dp, 1, keys_t, lkp, weights, lkp, rows, lkp, d, false);
    gemm<W>(d_out, dp, 1, values_t, lkp, d_scores, lkp, rows, lkp, d, false);
    for (int r = 0; r < rows; ++r) {
      float *weight = weights + (size_t)r * lkp, *d_score = d_scores + (size_t)r * lkp;
      const float inverse = lk ? 1.0f / softmax_row<W>(weight, lk, lkp, nullptr) : 0.0f;
      f32v<W> dot{};
      for (int j = 0; j < lkp; j += W) {
        const f32v<W> p = load<W>(weight + j) * inverse;
        store<W>(weight + j, p);
        dot += p * load<W>(d_score + j);
      }
      const float mean = sum<W>(dot);
      for (int j = 0; j < lkp; j += W) store<W>(d_score + j, load<W>(weight + j) * (load<W>(d_score + j) - mean));
    }
    const bool more = start > 0;
    gemm<W>(weights, 1, lkp, d_out, dp, d_values, dp, lk, dp, rows, more);
    gemm<W>(d_scores, 1, lkp, queries, dp, d_keys, dp, lk, dp, rows, more);  // queries carry the scale
    gemm<W>(d_scores, lkp, 1, keys, dp, d_queries, dp, rows, dp, lk, false);
    for (size_t i = 0; i < (size_t)rows * dp; i += W) store<W>(d_queries + i, load<W>(d_queries + i) * scale);
    unpack<W, T>(d_queries, dp, grad_q, first, rows, t.head, d);
  }
  unpack<W, T>(d_keys, dp, grad_k, t.first_k, lk, t.head, d);
  unpack<W, T>(d_values, dp, grad_v, t.first_k, lk, t.head, d);
}

template <int W>
STELLAR_FAST_INLINE void run_forward_body(const Task &t, const Heads &q, const Heads &k, const Heads &v, const Heads &out, float *lse,
                                          Workspace &space) {
  if (t.shape->is_bfloat16)
    forward_task<W, bfloat16>(t, q, k, v, out, lse, space);
  else
    forward_task<W, float>(t, q, k, v, out, lse, space);
}

template <int W>
STELLAR_FAST_INLINE void run_backward_body(const Task &t, const Heads &grad_out, const Heads &q, const Heads &k, const Heads &v,
                                           const Heads &grad_q, const Heads &grad_k, const Heads &grad_v, Workspace &space) {
  if (t.shape->is_bfloat16)
    backward_task<W, bfloat16>(t, grad_out, q, k, v, grad_q, grad_k, grad_v, space);
  else
    backward_task<W, float>(t, grad_out, q, k, v, grad_q, grad_k, grad_v, space);
}

STELLAR_FAST_BY_LEVEL(run_forward,
                      (const Task &t, const Heads &q, const Heads &k, const Heads &v, const Heads &out, float *lse, Workspace &space),
                      (t, q, k, v, out, lse, space))
STELLAR_FAST_BY_LEVEL(run_backward,
                      (const Task &t, const Heads &grad_out, const Heads &q, const Heads &k, const Heads &v, const Heads &grad_q,
                       const Heads &grad_k, const Heads &grad_v, Workspace &space),
                      (t, grad_out, q, k, v, grad_q, grad_k, grad_v, space))

#if STELLAR_FAST_HAS_BF16_DOT
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")

// The same on pairs of bfloat16. Weights and gradients of scores are rounded to it, as any product of 16-bit operands has them.

// Rows as they are, (rows, pairs of channels), with zeros up to `to_row` pairs.
STELLAR_FAST_INLINE void pack_pairs(const Heads &x, int first, int rows, int head, int width, bf16_pair *to, int to_row) {
  for (int r = 0; r < rows; ++r) {
    bfloat16 *out = reinterpret_cast<bfloat16 *>(to + (size_t)r * to_row);
    std::memcpy(out, row_of<const bfloat16>(x, first + r, head), width * sizeof(bfloat16));
    std::fill(out + width, out + 2 * to_row, bfloat16{0});
  }
}

// Each two rows as one row of pairs, (rows / 2, channels): `from` has `from_row` pairs of channels a row. A missing row is zero.
STELLAR_FAST_INLINE void pair_rows(const bf16_pair *from, int from_row, int rows, bf16_pair *to, int to_row) {
  for (int r = 0; r < rows; r += 2) {
    const bfloat16 *low = reinterpret_cast<const bfloat16 *>(from + (size_t)r * from_row);
    const bfloat16 *high = reinterpret_cast<const bfloat16 *>(from + (size_t)(r + 1) * from_row);
    bf16_pair *out = to + (size_t)(r / 2) * to_row;
    if (r + 1 < rows)
      for (int c = 0; c < to_row; ++c) out[c] = low[c].bits | (uint32_t)high[c].bits << 16;
    else
      for (int c = 0; c < to_row; ++c) out[c] = low[c].bits;
  }
}

STELLAR_FAST_INLINE void scale_rows(float *x, size_t count, float factor) {
  for (size_t i = 0; i < count; i += 16) store<16>(x + i, load<16>(x + i) * factor);
}

STELLAR_FAST_INLINE void to_bfloat16(const float *from, int count, bf16_pair *to) {
  for (int j = 0; j < count; j += 16) store<16>(reinterpret_cast<bfloat16 *>(to) + j, load<16>(from + j));
}

STELLAR_FAST_INLINE void transpose_pairs(const bf16_pair *from, int from_row, int rows, int pairs, bf16_pair *to, int to_row) {
  transpose<16>(reinterpret_cast<const float *>(from), from_row, rows, pairs, reinterpret_cast<float *>(to), to_row);
}

void forward_bf16(const Task &t, const Heads &q, const Heads &k, const Heads &v, const Heads &out, float *lse, Workspace &space) {
  const int d = t.shape->head_dim, dp = padded(d), dw = dp / 2, lk = t.rows_k, lkp = 2 * padded((lk + 1) / 2), lw = lkp / 2;
  const size_t wide = (size_t)(lk + 1) * dw;
  space.reserve(wide + (size_t)dw * lkp + (size_t)(lk + 1) / 2 * dp + (size_t)QUERY_BLOCK * (dw + dp + lkp + lw) + 8 * PAD);
  auto pairs = [&](size_t count) { return reinterpret_cast<bf16_pair *>(space.take(count)); };
  bf16_pair *rows_kv = pairs(wide), *keys_t = pairs((size_t)dw * lkp), *values = pairs((size_t)(lk + 1) / 2 * dp);
  bf16_pair *queries = pairs((size_t)QUERY_BLOCK * dw), *weights = pairs((size_t)QUERY_BLOCK * lw);
  float *scores = space.take((size_t)QUERY_BLOCK * lkp), *result = space.take((size_t)QUERY_BLOCK * dp);
  pack_pairs(k, t.first_k, lk, t.head, d, rows_kv, dw);
  transpose_pairs(rows_kv, dw, lk, dw, keys_t, lkp);
  pack_pairs(v, t.first_k, lk, t.head, d, rows_kv, dw);
  pair_rows(rows_kv, dw, lk, values, dp);
  for (int start = 0; start < t.rows_q; start += QUERY_BLOCK) {
    const int rows = std::min(QUERY_BLOCK, t.rows_q - start), first = t.first_q + start;
    pack_pairs(q, first, rows, t.head, d, queries, dw);
    gemm_bf16(queries, dw, 1, keys_t, lkp, scores, lkp, rows, lkp, dw, false);
    scale_rows(scores, (size_t)rows * lkp, t.shape->scale);
    float inverse[QUERY_BLOCK];
    for (int r = 0; r < rows; ++r) {
      float top, *row = scores + (size_t)r * lkp;
      const float total = lk ? softmax_row<16>(row, lk, lkp, &top) : 0.0f;
      lse[first + r] = lk ? top + std::log(total) : -std::numeric_limits<float>::infinity();
      inverse[r] = lk ? 1.0f / total : 0.0f;
      to_bfloat16(row, lkp, weights + (size_t)r * lw);
    }
    gemm_bf16(weights, lw, 1, values, dp, result, dp, rows, dp, (lk + 1) / 2, false);
    for (int r = 0; r < rows; ++r) scale_rows(result + (size_t)r * dp, dp, inverse[r]);
    unpack<16, bfloat16>(result, dp, out, first, rows, t.head, d);
  }
}

void backward_bf16(const Task &t, const Heads &grad_out, const Heads &q, const Heads &k, const Heads &v, const Heads &grad_q,
                   const Heads &grad_k, const Heads &grad_v, Workspace &space) {
  const int d = t.shape->head_dim, dp = padded(d), dw = dp / 2, lk = t.rows_k, lkp = 2 * padded((lk + 1) / 2), lw = lkp / 2;
  const int half_k = (lk + 1) / 2;
  const size_t wide = (size_t)(lk + 1) * dw, tall = (size_t)dw * lkp, full = (size_t)lk * dp;
  const size_t block = (size_t)QUERY_BLOCK * dw, scores_size = (size_t)QUERY_BLOCK * lkp;
  space.reserve(wide + 2 * tall + (size_t)half_k * dp + 2 * full + 6 * block + 4 * scores_size + 20 * PAD);
  auto pairs = [&](size_t count) { return reinterpret_cast<bf16_pair *>(space.take(count)); };
  bf16_pair *rows_kv = pairs(wide), *keys_t = pairs(tall), *values_t = pairs(tall), *keys = pairs((size_t)half_k * dp);
  float *d_keys = space.take(full), *d_values = space.take(full);
  bf16_pair *queries = pairs(block), *d_out = pairs(block), *query_pairs = pairs(block), *d_out_pairs = pairs(block);
  float *d_queries = space.take(2 * block), *weights = space.take(scores_size), *d_scores = space.take(scores_size);
  bf16_pair *d_score_rows = pairs(scores_size / 2), *weight_pairs = pairs(scores_size / 2), *d_score_pairs = pairs(scores_size / 2);
  bf16_pair *weight_rows = pairs(scores_size / 2);
  pack_pairs(v, t.first_k, lk, t.head, d, rows_kv, dw);
  transpose_pairs(rows_kv, dw, lk, dw, values_t, lkp);
  pack_pairs(k, t.first_k, lk, t.head, d, rows_kv, dw);
  transpose_pairs(rows_kv, dw, lk, dw, keys_t, lkp);
  pair_rows(rows_kv, dw, lk, keys, dp);
  if (!t.rows_q) std::fill_n(d_keys, full, 0.0f), std::fill_n(d_values, full, 0.0f);
  for (int start = 0; start < t.rows_q; start += QUERY_BLOCK) {
    const int rows = std::min(QUERY_BLOCK, t.rows_q - start), first = t.first_q + start, half = (rows + 1) / 2;
    const float scale = t.shape->scale;
    pack_pairs(q, first, rows, t.head, d, queries, dw);
    pack_pairs(grad_out, first, rows, t.head, d, d_out, dw);
    pair_rows(queries, dw, rows, query_pairs, dp);
    pair_rows(d_out, dw, rows, d_out_pairs, dp);
    gemm_bf16(queries, dw, 1, keys_t, lkp, weights, lkp, rows, lkp, dw, false);
    gemm_bf16(d_out, dw, 1, values_t, lkp, d_scores, lkp, rows, lkp, dw, false);
    scale_rows(weights, (size_t)rows * lkp, scale);
    for (int r = 0; r < rows; ++r) {
      float *weight = weights + (size_t)r * lkp, *d_score = d_scores + (size_t)r * lkp;
      const float inverse = lk ? 1.0f / softmax_row<16>(weight, lk, lkp, nullptr) : 0.0f;
      f32v<16> dot{};
      for (int j = 0; j < lkp; j += 16) {
        const f32v<16> p = load<16>(weight + j) * inverse;
        store<16>(weight + j, p);
        dot += p * load<16>(d_score + j);
      }
      const float mean = sum<16>(dot);
      for (int j = 0; j < lkp; j += 16) store<16>(d_score + j, load<16>(weight + j) * (load<16>(d_score + j) - mean));
      to_bfloat16(weight, lkp, weight_rows + (size_t)r * lw);
      to_bfloat16(d_score, lkp, d_score_rows + (size_t)r * lw);
    }
    pair_rows(weight_rows, lw, rows, weight_pairs, lkp);
    pair_rows(d_score_rows, lw, rows, d_score_pairs, lkp);
    const bool more = start > 0;
    gemm_bf16(weight_pairs, 1, lkp, d_out_pairs, dp, d_values, dp, lk, dp, half, more);
    gemm_bf16(d_score_pairs, 1, lkp, query_pairs, dp, d_keys, dp, lk, dp, half, more);
    gemm_bf16(d_score_rows, lw, 1, keys, dp, d_queries, dp, rows, dp, half_k, false);
    scale_rows(d_queries, (size_t)rows * dp, scale);
    unpack<16, bfloat16>(d_queries, dp, grad_q, first, rows, t.head, d);
  }
  scale_rows(d_keys, full, t.shape->scale);
  unpack<16, bfloat16>(d_keys, dp, grad_k, t.first_k, lk, t.head, d);
  unpack<16, bfloat16>(d_values, dp, grad_v, t.first_k, lk, t.head, d);
}

#pragma GCC pop_options
#endif

Task task_at(const AttentionShape &shape, int index) {
  const int i = index / shape.heads;
  return {&shape,
          shape.starts_q[i],
          shape.starts_q[i + 1] - shape.starts_q[i],
          shape.starts_k[i],
          shape.starts_k[i + 1] - shape.starts_k[i],
          index % shape.heads};
}

}  // namespace

void token_attention_forward(const AttentionShape &shape, Heads q, Heads k, Heads v, Heads out, float *lse, int threads) {
  const int total_q = shape.starts_q[shape.sequences];
#pragma omp parallel num_threads(threads)
  {
    static thread_local Workspace space;
#pragma omp for schedule(dynamic)
    for (int index = 0; index < shape.sequences * shape.heads; ++index) {
      const Task task = task_at(shape, index);
      float *task_lse = lse + (size_t)task.head * total_q;
#if STELLAR_FAST_HAS_BF16_DOT
      if (shape.is_bfloat16 && processor_has_bf16_dot()) {
        forward_bf16(task, q, k, v, out, task_lse, space);
        continue;
      }
#endif
      run_forward(task, q, k, v, out, task_lse, space);
    }
    space.finish();
  }
}

void token_attention_backward(const AttentionShape &shape, Heads grad_out, Heads q, Heads k, Heads v, Heads grad_q, Heads grad_k,
                              Heads grad_v, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Workspace space;
#pragma omp for schedule(dynamic)
    for (int index = 0; index < shape.sequences * shape.heads; ++index) {
      const Task task = task_at(shape, index);
#if STELLAR_FAST_HAS_BF16_DOT
      if (shape.is_bfloat16 && processor_has_bf16_dot()) {
        backward_bf16(task, grad_out, q, k, v, grad_q, grad_k, grad_v, space);
        continue;
      }
#endif
      run_backward(task, grad_out, q, k, v, grad_q, grad_k, grad_v, space);
    }
    space.finish();
  }
}

}  // namespace stellar_fast
