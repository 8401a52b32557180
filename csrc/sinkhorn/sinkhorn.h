#pragma once

#include <cstddef>
#include <cstdint>

namespace stellar_fast {

// A matrix of floats or bfloat16, the elements of a row next to each other, `stride` of them from one row to the next.
struct SinkhornLogits {
  int rows, columns;
  const void *data;
  bool is_bfloat16;
  ptrdiff_t stride;
  float inverse_temperature;
};

// Of `parts` contiguous groups of rows, each by its own thread: peaks = the largest logit / temperature of a column,
// sums = its sum of exp(logit / temperature - peak); both (parts, columns).
void sinkhorn_columns(const SinkhornLogits &logits, float *peaks, float *sums, int parts);

// Takes the logarithm of a row's sum of t = exp(logit / temperature + column + row) off its `row` (which is changed), and divides t by that
// sum. Then, each where it is not null:
//   sums     (parts, columns): sums of t over each group of rows, for the next round
//   out      (rows, columns): t
//   entropy  (rows): -sum of t log t, and with it first (rows): the column of the largest t, the lowest of several
void sinkhorn_rows(const SinkhornLogits &logits, const float *column, float *row, float *sums, float *out, float *entropy, int64_t *first,
                   int parts);

}  // namespace stellar_fast
