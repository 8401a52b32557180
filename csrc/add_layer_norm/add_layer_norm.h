#pragma once

#include <cstddef>

namespace stellar_fast {

// Rows of floats or bfloat16, contiguous each; `stride` elements from one to the next. Absent where `data` is null.
struct Rows {
  void *data;
  bool is_bfloat16;
  ptrdiff_t stride;
};

// total = residual + x, rounded to its dtype (bfloat16 where both are); normed = (total - mean) * rstd * weight + bias, where
// rstd = 1 / sqrt(variance + eps). `total` is dense; without a residual x takes its place and nothing is written there.
//   weight, bias   `width` floats
//   mean, rstd     `count` floats each
void add_layer_norm_forward(int count, int width, Rows x, Rows residual, const float *weight, const float *bias, float eps, void *total,
                            Rows normed, float *mean, float *rstd, int threads);

// grad = grad_total (where present) + the gradient of the norm, dense in total's dtype; where `grad_x` is not null also there, as
// bfloat16. `grad_weight` and `grad_bias` (`width` floats each) are the same every time for the same number of threads.
// total, grad and grad_total have one dtype.
void add_layer_norm_backward(int count, int width, Rows grad_normed, Rows grad_total, Rows total, const float *weight, const float *mean,
                             const float *rstd, void *grad, void *grad_x, float *grad_weight, float *grad_bias, int threads);

}  // namespace stellar_fast
