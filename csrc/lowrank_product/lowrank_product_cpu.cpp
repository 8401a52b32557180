// A task is an image, or a run of its patches where images are few. It packs the image's tokens once (they stay in the caches) and takes
// its patches a few rows at a time, so that query and grad_out come from memory once, out and grad_query go there once.
#include "lowrank_product/lowrank_product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "lowrank_product/tiles.h"

namespace stellar_fast {
namespace {

using namespace lowrank;

constexpr int kBlock = 64;  // patches of a backward block: their rows and the packed tokens fit a second-level cache of 1 MiB

struct Task {
  int image, begin, end;  // patches [begin, end)
};

// Floats with the alignment of the widest vector: a vector across two cache lines costs two accesses.
class Floats {
 public:
  explicit Floats(size_t count) : data_(static_cast<float *>(::operator new(count * sizeof(float), kAlign))) {}
  float *get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float *p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<float, Free> data_;
};

// Hands out consecutive parts of one block.
struct Parts {
  float *next;
  float *take(size_t count) { return std::exchange(next, next + count); }
};

float inverse_norm(float sum_of_squares) {
  const float norm = std::sqrt(sum_of_squares);
  return norm <= 1e-7f ? kLowrankClampedScale : 1.0f / norm;
}

// Rows [first, first + kRows) of an image, the last one repeated where the task ends before.
template <int W>
STELLAR_FAST_INLINE void gather_rows(const Matrices &m, const Task &task, int first, int width, float *scratch, const float **rows) {
  const int count = std::min(kRows<W>, task.end - first);
#pragma GCC unroll 8
  for (int r = 0; r < kRows<W>; ++r)
    rows[r] = r < count ? float_row<W>(m, task.image, first + r, width, scratch + r * padded(width)) : rows[count - 1];
}

size_t forward_scratch(const LowrankShape &s) {
  const size_t tokens = padded(s.tokens), key_width = padded(s.key_width), value_width = padded(s.value_width);
  return tokens * (2 * key_width + value_width) + kMaxRows * (2 * tokens + key_width) + 2 * tokens;
}

template <int W>
STELLAR_FAST_INLINE void forward_task_body(const LowrankForward &c, const Task &task, float *peak, float *scratch) {
  const LowrankShape &s = c.shape;
  constexpr int R = kRows<W>;
  const int K = s.tokens, D = s.key_width, E = s.value_width, stride = padded(K);
  const bool cosine = c.temperature > 0;
  Parts parts{scratch};
  float *key = parts.take(stride * padded(D)), *key_columns = parts.take(D * stride), *value = parts.take(stride * padded(E));
  float *logits = parts.take(R * stride), *weights = parts.take(R * stride), *converted = parts.take(R * padded(D));
  float *factors = parts.take(stride), *best = parts.take(stride);

  pack_rows<W>(c.key, task.image, K, D, key);
  pack_rows<W>(c.value, task.image, K, E, value);
  for (int k = 0; k < K; ++k) {
    const float scale = cosine ? inverse_norm(sum_of_squares<W>(key + k * padded(D), D)) : 1.0f;
    if (!task.begin) c.key_scale[size_t(task.image) * K + k] = scale;
    factors[k] = cosine ? scale / c.temperature : 1.0f;
  }
  pack_columns<W>(key, K, D, factors, key_columns);
  std::fill(best, best + stride, 0.0f);

  const float ones[kMaxRows] = {1, 1, 1, 1, 1, 1, 1, 1};
  for (int first = task.begin; first < task.end; first += R) {
    const int last = std::min(R, task.end - first) - 1;  // rows beyond it do its work again, to the same place
    const size_t row = size_t(task.image) * s.patches + first;
    const float *query[R], *bias[R];
    float *out[R];
    gather_rows<W>(c.query, task, first, D, converted, query);
    for (int r = 0; r <= last; ++r)
      c.query_scale[row + r] = cosine ? inverse_norm(sum_of_squares<W>(query[r], D)) : 1.0f / std::sqrt(float(D));
    multiply<W>(query, D, key_columns, stride, logits, Ahead(c.query, task.image, first + R));
    for (int r = 0; r < R; ++r) {
      const size_t at = row + std::min(r, last);
      float *z = logits + r * stride, *w = weights + r * stride;
      for (int k = 0; k < stride; k += W) store<W>(z + k, load<W>(z + k) * c.query_scale[at]);
      softmax<W>(z, K, stride, w);
      for (int k = 0; k < stride; k += W) store<W>(best + k, maximum_or_nan<W>(load<W>(best + k), load<W>(w + k)));
      std::memcpy(c.logits + at * K, z, K * sizeof(float));
      if (c.localization) std::memcpy(c.localization + at * K, w, K * sizeof(float));
      if (c.bias) bias[r] = c.bias + size_t(first + std::min(r, last)) * E;
      out[r] = c.out + at * E;
    }
    mix<W>(weights, stride, K, value, Start{c.bias ? bias : nullptr, ones, nullptr}, out, E);
  }
  std::memcpy(peak, best, K * sizeof(float));
}
STELLAR_FAST_BY_LEVEL(forward_task, (const LowrankForward &c, const Task &task, float *peak, float *scratch), (c, task, peak, scratch))

// What a task of the backward adds up: grad_value, grad_key without its projection, and over patches grad_logits * logits.
struct Sums {
  float *value, *key, *along;
  Sums(const LowrankShape &s, float *data)
      : value(data), key(value + size_t(padded(s.tokens)) * padded(s.value_width)),
        along(key + size_t(padded(s.tokens)) * padded(s.key_width)) {}
  static size_t size(const LowrankShape &s) {
    return size_t(padded(s.tokens)) * (padded(s.value_width) + padded(s.key_width) + 1);
  }
};

// What a block of patches leaves between its two halves, a row a patch.
struct Block {
  float *weights;      // the localization
  float *slopes;       // gradient of the logits, times both scales over the temperature: factors of the tokens in grad_query
  float *projections;  // factor of the query in its own gradient, which takes out the part along it
};

size_t backward_scratch(const LowrankShape &s) {
  const size_t tokens = padded(s.tokens), key_width = padded(s.key_width), value_width = padded(s.value_width);
  return tokens * (key_width + 2 * value_width + 1) + kBlock * (2 * tokens + 1 + key_width) + kMaxRows * (2 * tokens + key_width);
}

// First half: grad_out against the values, and back through the softmax.
template <int W>
STELLAR_FAST_INLINE void differentiate_softmax(const LowrankBackward &c, const Task &task, const float *value_columns,
                                               const float *factors, float *scratch, const Block &block, float *along_sums) {
  const LowrankShape &s = c.shape;
  constexpr int R = kRows<W>;
  const int K = s.tokens, stride = padded(K);
  float *grads = scratch, *logits = scratch + R * stride;
  std::fill(logits, logits + stride, 0.0f);
  for (int first = task.begin; first < task.end; first += R) {
    const float *grad_out[R];
    gather_rows<W>(c.grad_out, task, first, s.value_width, nullptr, grad_out);
    multiply<W>(grad_out, s.value_width, value_columns, stride, grads, Ahead(c.grad_out, task.image, first + R));
    for (int r = 0; r < std::min(R, task.end - first); ++r) {
      const size_t row = size_t(task.image) * s.patches + first + r;
      const int at = first + r - task.begin;
      float *w = block.weights + at * stride, *slope = block.slopes + at * stride, *g = grads + r * stride;
      std::memcpy(logits, c.logits + row * K, K * sizeof(float));
      softmax<W>(logits, K, stride, w);
      if (c.grad_localization)
        for (int k = 0; k < K; ++k) g[k] += c.grad_localization[row * K + k];
      f32v<W> products = {}, total = {};
      for (int k = 0; k < stride; k += W) products += load<W>(w + k) * load<W>(g + k);
      const float inner = sum<W>(products);
      const float scale = c.query_scale[row];
      for (int k = 0; k < stride; k += W) {
        const f32v<W> grad = load<W>(w + k) * (load<W>(g + k) - inner), along = grad * load<W>(logits + k);
        store<W>(along_sums + k, load<W>(along_sums + k) + along);
        total += along;
        store<W>(slope + k, grad * load<W>(factors + k) * scale);
      }
      const bool constant = c.temperature == 0 || scale >= kLowrankClampedScale;
      block.projections[at] = constant ? 0.0f : -scale * scale * sum<W>(total);
    }
  }
}

// Second half: grad_query. Returns the block's queries as floats, `query_stride` apart.
template <int W>
STELLAR_FAST_INLINE const float *differentiate_query(const LowrankBackward &c, const Task &task, const float *key, const Block &block,
                                                     float *converted, float *written, ptrdiff_t *query_stride) {
  const LowrankShape &s = c.shape;
  constexpr int R = kRows<W>;
  const int D = s.key_width, stride = padded(s.tokens);
  const bool in_place = !c.query.is_bfloat16;
  const float *queries = nullptr;
  for (int first = task.begin; first < task.end; first += R) {
    const int at = first - task.begin, last = std::min(R, task.end - first) - 1;
    const size_t row = size_t(task.image) * s.patches + first;
    const float *query[R];
    float weights[R * kLowrankMaxTokens], factors[R], *out[R];
    gather_rows<W>(c.query, task, first, D, converted + at * padded(D), query);
    if (!at) queries = query[0];
    for (int r = 0; r < R; ++r) {
      const int same = std::min(r, last);  // rows beyond the last do its work again, to the same place
      std::memcpy(weights + r * stride, block.slopes + (at + same) * stride, stride * sizeof(float));
      factors[r] = block.projections[at + same];
      out[r] = in_place ? static_cast<float *>(c.grad_query) + (row + same) * D : written + r * padded(D);
    }
    const Ahead ahead(c.query, task.image, first + R);
    mix<W>(weights, stride, s.tokens, key, Start{query, factors, &ahead}, out, D);
    if (!in_place)
      for (int r = 0; r <= last; ++r) write_row<W>(c.grad_query, true, row + r, D, out[r]);
  }
  *query_stride = in_place ? c.query.row_stride : padded(D);
  return queries;
}

template <int W>
STELLAR_FAST_INLINE void backward_task_body(const LowrankBackward &c, const Task &task, float *sums_data, float *scratch) {
  const LowrankShape &s = c.shape;
  const int K = s.tokens, D = s.key_width, E = s.value_width, stride = padded(K);
  const Sums sums(s, sums_data);
  Parts parts{scratch};
  float *key = parts.take(stride * padded(D)), *value = parts.take(stride * padded(E)), *value_columns = parts.take(E * stride);
  const Block block{parts.take(kBlock * stride), parts.take(kBlock * stride), parts.take(kBlock)};
  float *converted = parts.take(kBlock * padded(D)), *written = parts.take(kMaxRows * padded(D));
  float *factors = parts.take(stride), *products = parts.take(2 * kMaxRows * stride);

  pack_rows<W>(c.key, task.image, K, D, key);
  pack_rows<W>(c.value, task.image, K, E, value);
  pack_columns<W>(value, K, E, nullptr, value_columns);
  std::fill(sums_data, sums_data + Sums::size(s), 0.0f);
  std::fill(factors, factors + stride, 0.0f);
  for (int k = 0; k < K; ++k) factors[k] = c.key_scale[size_t(task.image) * K + k] / (c.temperature > 0 ? c.temperature : 1.0f);

  for (int begin = task.begin; begin < task.end; begin += kBlock) {
    const Task part{task.image, begin, std::min(begin + kBlock, task.end)};
    const int rows = part.end - begin;
    differentiate_softmax<W>(c, part, value_columns, factors, products, block, sums.along);
    const float *grad_out = float_row<W>(c.grad_out, task.image, begin, E, nullptr);
    accumulate<W>(block.weights, stride, rows, grad_out, c.grad_out.row_stride, E, sums.value);
    ptrdiff_t query_stride;
    const float *query = differentiate_query<W>(c, part, key, block, converted, written, &query_stride);
    accumulate<W>(block.slopes, stride, rows, query, query_stride, D, sums.key);
  }
}
STELLAR_FAST_BY_LEVEL(backward_task, (const LowrankBackward &c, const Task &task, float *sums, float *scratch), (c, task, sums, scratch))

// Adds up the tasks of an image and writes its grad_key and grad_value. `scratch` holds a row of the keys.
template <int W>
STELLAR_FAST_INLINE void finish_image_body(const LowrankBackward &c, int image, float *sums_data, int count, float *scratch) {
  const LowrankShape &s = c.shape;
  const int K = s.tokens, D = s.key_width, E = s.value_width;
  const size_t size = Sums::size(s);
  for (int i = 1; i < count; ++i)
    for (size_t at = 0; at < size; at += W) store<W>(sums_data + at, load<W>(sums_data + at) + load<W>(sums_data + i * size + at));
  const Sums sums(s, sums_data);
  for (int k = 0; k < K; ++k) {
    const size_t row = size_t(image) * K + k;
    const float scale = c.key_scale[row];
    float *grad_key = sums.key + k * padded(D);
    if (c.temperature > 0 && scale < kLowrankClampedScale) {
      const float *key = float_row<W>(c.key, image, k, D, scratch);
      const float factor = -scale * scale * sums.along[k];
      for (int i = 0; i < D; ++i) grad_key[i] += factor * key[i];
    }
    write_row<W>(c.grad_key, c.key.is_bfloat16, row, D, grad_key);
    write_row<W>(c.grad_value, c.value.is_bfloat16, row, E, sums.value + k * padded(E));
  }
}
STELLAR_FAST_BY_LEVEL(finish_image, (const LowrankBackward &c, int image, float *sums, int count, float *scratch),
                      (c, image, sums, count, scratch))

// Patches of a task: a whole image, or less where images do not share out evenly among the threads (at most an eighth of their time is
// spent waiting for the last). Depends on the shape and the threads alone.
int patches_per_task(const LowrankShape &s, int threads) {
  const int most = (s.patches + kBlock - 1) / kBlock;
  int segments = 1;
  while (segments < most && 8 * threads * ((s.images * segments + threads - 1) / threads) > 9 * s.images * segments) ++segments;
  return (s.patches + segments - 1) / segments;
}

}  // namespace

void lowrank_product_forward(const LowrankForward &c, int threads) {
  const LowrankShape &s = c.shape;
  const int step = patches_per_task(s, threads), segments = (s.patches + step - 1) / step, tasks = s.images * segments;
  if (!tasks) return;
  const Floats peaks(segments > 1 ? size_t(tasks) * s.tokens : 0);
#pragma omp parallel num_threads(std::min(threads, tasks))
  {
    const Floats scratch(forward_scratch(s));
#pragma omp for schedule(static)
    for (int i = 0; i < tasks; ++i) {
      const int begin = i % segments * step;
      float *peak = (segments > 1 ? peaks.get() : c.peak) + size_t(i) * s.tokens;
      forward_task(c, Task{i / segments, begin, std::min(begin + step, s.patches)}, peak, scratch.get());
    }
  }
  if (segments == 1) return;
  for (int image = 0; image < s.images; ++image)
    for (int k = 0; k < s.tokens; ++k) {
      const float *peak = peaks.get() + size_t(image) * segments * s.tokens + k;
      float best = *peak;
      for (int i = 1; i < segments && !std::isnan(best); ++i) best = std::max(peak[size_t(i) * s.tokens], best);
      c.peak[size_t(image) * s.tokens + k] = best;
    }
}

void lowrank_product_backward(const LowrankBackward &c, int threads) {
  const LowrankShape &s = c.shape;
  const int step = patches_per_task(s, threads), segments = (s.patches + step - 1) / step, tasks = s.images * segments;
  if (!tasks) return;
  const size_t size = Sums::size(s);
  const Floats all_sums(segments > 1 ? tasks * size : 0);
#pragma omp parallel num_threads(std::min(threads, tasks))
  {
    const Floats scratch(backward_scratch(s)), own_sums(segments > 1 ? 0 : size);
#pragma omp for schedule(static)
    for (int i = 0; i < tasks; ++i) {
      const int begin = i % segments * step, image = i / segments;
      float *sums = segments > 1 ? all_sums.get() + i * size : own_sums.get();
      backward_task(c, Task{image, begin, std::min(begin + step, s.patches)}, sums, scratch.get());
      if (segments == 1) finish_image(c, image, sums, 1, scratch.get());
    }
    if (segments > 1) {
#pragma omp for schedule(static)
      for (int image = 0; image < s.images; ++image)
        finish_image(c, image, all_sums.get() + image * segments * size, segments, scratch.get());
    }
  }
}

}  // namespace stellar_fast
