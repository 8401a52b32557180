#pragma once

#include <cstddef>
#include <cstdint>

namespace stellar_fast {

// What the rows learn. Soft: t_c = exp(logits_c / temperature + row + column_c) of the target that `index` names; hard where `classes` is
// not null: one prototype each, by the same index. Without `index` row i learns target i.
struct PrototypeTargets {
  const void *logits;  // (targets, prototypes), rows contiguous each
  bool is_bfloat16;
  ptrdiff_t stride;     // elements from one row to the next
  const float *row;     // (targets)
  const float *column;  // (prototypes)
  float temperature;
  const int64_t *classes;
  const int64_t *index;
};

// `count` predictions of `prototypes` logits each, dense. With x = logits / temperature and lse = log sum_c exp(x_c):
//   loss_r = sum_c t_c (lse - x_c),  and where `weights` (count) is not null the logits become
//   (softmax_c sum t - t_c) * weights_r / temperature
// The result does not depend on the number of threads.
void prototype_cross_entropy_rows(int count, int prototypes, void *logits, bool is_bfloat16, const PrototypeTargets &targets,
                                  float temperature, const float *weights, double *loss, int threads);

}  // namespace stellar_fast
