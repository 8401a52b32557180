// A pass over the logits reads each of them from memory once and takes one exponential of it. A row is normalised while it is in the
// second-level cache, and goes straight into the column sums of the next round.
#include "sinkhorn/sinkhorn.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>

#include "common/allocator.h"
#include "common/vec.h"

namespace stellar_fast {
namespace {

constexpr float kSumEps = 1e-8f;
constexpr int kColumnRows = 8;  // rows at a time of the column pass: a rescaling of the sum, one more exponential, for each of them
constexpr int kRows = 4;        // rows at a time of the row pass: a column's potential and sum are read once for them
// Lines of 64 KiB (16,384 columns) at multiples of 4 KiB from each other would fall into the same sets of the first-level cache.
constexpr int kSpread = 5 * kWidest;

// First row of a part.
int part_of(int rows, int part, int parts) { return int((long long)rows * part / parts); }

constexpr float kLargest = 69.3147181f;  // 100 log 2: no sum of such exponentials, and no product with one, leaves the normal floats

// exp within 2e-7 for |x| <= kLargest. 2^-100 below: nothing beside the 1e-8 of the sums. 2^100 above, where only the rounding of
// scores beyond 1e8 leads: the formula's own numbers are at most e^50. A NaN stays one.
template <int W>
STELLAR_FAST_INLINE f32v<W> exp_score(f32v<W> x) {
  typedef f32v<W> F;
  typedef i32v<W> I;
  const F lowest = F{} - kLargest, highest = F{} + kLargest;
  x = lowest > x ? lowest : x;
  x = highest < x ? highest : x;
  const F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F r = x - (shifted - 12582912.0f) * 0.693147181f;
  F p = r * 1.38145987e-3f + 8.36871707e-3f;
  p = p * r + 4.16683881e-2f;
  p = p * r + 1.66665206e-1f;
  p = p * r + 4.99999934e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (F)((I)p + ((I)shifted << 23));
}

// body(first column of a vector, how many it has)
template <int W, typename Body>
STELLAR_FAST_INLINE void for_vectors(int columns, Body body) {
  int i = 0;
  for (; i + W <= columns; i += W) body(i, W);
  if (i < columns) body(i, columns - i);
}
#define STELLAR_FAST_BODY [&](int i, int n) __attribute__((always_inline))

// `Rows` rows from `first`: into the running peaks (of the logits themselves) and sums, pad(columns) floats each.
template <int W, int Rows, typename T>
STELLAR_FAST_INLINE void add_to_columns(const SinkhornLogits &x, int first, float *peaks, float *sums) {
  typedef f32v<W> F;
  const T *line[Rows];
  for (int k = 0; k < Rows; ++k) line[k] = (const T *)x.data + (first + k) * x.stride;
  for_vectors<W>(x.columns, STELLAR_FAST_BODY {
    F value[Rows];
    const F before = load<W>(peaks + i);
    F peak = before;
#pragma GCC unroll 8
    for (int k = 0; k < Rows; ++k) {
      value[k] = load_first<W>(line[k] + i, n);
      peak = peak > value[k] ? peak : value[k];
    }
    F sum = load<W>(sums + i) * exp_score<W>((before - peak) * x.inverse_temperature);
#pragma GCC unroll 8
    for (int k = 0; k < Rows; ++k) sum += exp_score<W>((value[k] - peak) * x.inverse_temperature);
    store<W>(peaks + i, peak);
    store<W>(sums + i, sum);
  });
}

template <int W, typename T>
STELLAR_FAST_INLINE void column_part_of(const SinkhornLogits &x, int first, int last, float *peaks, float *sums) {
  for (; first + kColumnRows <= last; first += kColumnRows) add_to_columns<W, kColumnRows, T>(x, first, peaks, sums);
  for (; first < last; ++first) add_to_columns<W, 1, T>(x, first, peaks, sums);
}

template <int W>
STELLAR_FAST_INLINE void column_part_body(const SinkhornLogits &x, int first, int last, float *peaks, float *sums) {
  if (x.is_bfloat16)
    column_part_of<W, bfloat16>(x, first, last, peaks, sums);
  else
    column_part_of<W, float>(x, first, last, peaks, sums);
}

STELLAR_FAST_BY_LEVEL(column_part, (const SinkhornLogits &x, int first, int last, float *peaks, float *sums), (x, first, last, peaks, sums))

struct RowPass {
  SinkhornLogits x;
  const float *column;  // and -infinity up to pad(columns)
  float *row, *out, *entropy;
  int64_t *first;
};

// `Rows` rows from `first`. `lines` holds kRows * (pad(columns) + kSpread) floats; `sums`, pad(columns) of them or null, are added to.
template <int W, int Rows, bool kStatistics, typename T>
STELLAR_FAST_INLINE void normalise(const RowPass &p, int first, float *lines, float *sums) {
  typedef f32v<W> F;
  typedef i32v<W> I;
  const SinkhornLogits &x = p.x;
  const T *logits[Rows];
  float *t[Rows];
  F row[Rows], total[Rows]{}, with_log[Rows]{}, best[Rows];
  I best_at[Rows]{}, at;
  for (int lane = 0; lane < W; ++lane) at[lane] = lane;
  for (int k = 0; k < Rows; ++k) {
    logits[k] = (const T *)x.data + (first + k) * x.stride;
    t[k] = p.out ? p.out + (size_t)(first + k) * x.columns : lines + (size_t)k * (pad(x.columns) + kSpread);
    row[k] = F{} + p.row[first + k];
    best[k] = F{} - INFINITY;
  }
  for_vectors<W>(x.columns, STELLAR_FAST_BODY {
    const F column = load<W>(p.column + i);
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) {
      const F score = load_first<W>(logits[k] + i, n) * x.inverse_temperature + column;
      const F value = exp_score<W>(score + row[k]);
      store_first<W>(t[k] + i, value, n);
      total[k] += value;
      if (kStatistics) {
        const F log = score + row[k], most = log < kLargest ? log : F{} + kLargest;
        with_log[k] += value * (most > -100.0f ? most : F{} - 100.0f);  // the columns beyond the last have minus infinity
        const I better = score > best[k];
        best[k] = select<W>(better, score, best[k]);
        best_at[k] = (better & (at + i)) | (~better & best_at[k]);
      }
    }
  });
  float scale[Rows];
  for (int k = 0; k < Rows; ++k) {
    const float sum_t = sum<W>(total[k]), divisor = sum_t + kSumEps, log = std::log(divisor);
    scale[k] = 1 / divisor;
    p.row[first + k] -= log;
    if (kStatistics) {
      p.entropy[first + k] = scale[k] * (log * sum_t - sum<W>(with_log[k]));
      int chosen = best_at[k][0];
      float most = best[k][0];
      for (int lane = 1; lane < W; ++lane)
        if (best[k][lane] > most || (best[k][lane] == most && best_at[k][lane] < chosen)) most = best[k][lane], chosen = best_at[k][lane];
      p.first[first + k] = chosen;
    }
  }
  if (sums) {
    for_vectors<W>(x.columns, STELLAR_FAST_BODY {
      (void)n;  // lines and sums are padded
      F sum = load<W>(t[0] + i) * scale[0];
      for (int k = 1; k < Rows; ++k) sum += load<W>(t[k] + i) * scale[k];
      store<W>(sums + i, load<W>(sums + i) + sum);
    });
  } else if (p.out) {
    for (int k = 0; k < Rows; ++k)
      for_vectors<W>(x.columns, STELLAR_FAST_BODY { store_first<W>(t[k] + i, load_first<W>(t[k] + i, n) * scale[k], n); });
  }
}

template <int W, bool kStatistics, typename T>
STELLAR_FAST_INLINE void row_part_of(const RowPass &p, int first, int last, float *lines, float *sums) {
  for (; first + kRows <= last; first += kRows) normalise<W, kRows, kStatistics, T>(p, first, lines, sums);
  for (; first < last; ++first) normalise<W, 1, kStatistics, T>(p, first, lines, sums);
}

template <int W, typename T>
STELLAR_FAST_INLINE void row_part_from(const RowPass &p, int first, int last, float *lines, float *sums) {
  if (p.entropy)
    row_part_of<W, true, T>(p, first, last, lines, sums);
  else
    row_part_of<W, false, T>(p, first, last, lines, sums);
}

template <int W>
STELLAR_FAST_INLINE void row_part_body(const RowPass &p, int first, int last, float *lines, float *sums) {
  if (p.x.is_bfloat16)
    row_part_from<W, bfloat16>(p, first, last, lines, sums);
  else
    row_part_from<W, float>(p, first, last, lines, sums);
}

STELLAR_FAST_BY_LEVEL(row_part, (const RowPass &p, int first, int last, float *lines, float *sums), (p, first, last, lines, sums))

}  // namespace

void sinkhorn_columns(const SinkhornLogits &x, float *peaks, float *sums, int parts) {
  const size_t width = pad(x.columns);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) {
    const std::unique_ptr<float[]> running(new float[2 * width]());
    float *const peak = &running[0], *const sum = &running[width];
    std::fill(peak, peak + width, -FLT_MAX);
    column_part(x, part_of(x.rows, part, parts), part_of(x.rows, part + 1, parts), peak, sum);
    for (int i = 0; i < x.columns; ++i) peaks[(size_t)part * x.columns + i] = peak[i] * x.inverse_temperature;
    std::copy(sum, sum + x.columns, sums + (size_t)part * x.columns);
  }
}

void sinkhorn_rows(const SinkhornLogits &x, const float *column, float *row, float *sums, float *out, float *entropy, int64_t *first, int parts) {
  const size_t width = pad(x.columns);
  const std::unique_ptr<float[]> columns(new float[width]);
  std::fill(std::copy(column, column + x.columns, &columns[0]), &columns[width], -INFINITY);
  if (out) expect_first_write(out, (size_t)x.rows * x.columns * sizeof(float));
  const RowPass pass{x, &columns[0], row, out, entropy, first};
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) {
    const std::unique_ptr<float[]> scratch(new float[width + (out ? 0 : kRows * (width + kSpread))]);
    float *const sum = &scratch[0];
    std::fill(sum, sum + width, 0.0f);
    row_part(pass, part_of(x.rows, part, parts), part_of(x.rows, part + 1, parts), sum + width, sums ? sum : nullptr);
    if (sums) std::copy(sum, sum + x.columns, sums + (size_t)part * x.columns);
  }
}

}  // namespace stellar_fast
