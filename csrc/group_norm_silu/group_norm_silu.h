#pragma once

#include <cstddef>

#include "common/launch.h"

namespace stellar_fast {

// Images in channels-last memory: `pixels` rows of `channels` dense elements each, one image behind the other. x, residual, y, out and their
// gradients have one dtype.
struct GroupNorm {
  ptrdiff_t images, pixels;
  int channels, groups;  // the second divides the first
  const float *weight, *bias;  // a float a channel
  float eps;
};

// out = silu((x - mean) / sqrt(variance + eps) * weight + bias). With a residual (else null) y = x + residual, rounded to its dtype, is
// written and takes the place of x. `stats`: mean and biased variance of every image and group, 2 floats each, computed here or, where they
// are `given`, read. The same for any number of threads.
void group_norm_silu_forward(const GroupNorm &norm, const void *x, const void *residual, void *y, float *stats, bool given, void *out,
                             bool is_bfloat16, int threads);

// grad_x = the gradient through the norm, its statistics included, + grad_y (where it is not null); `grad_weight` and `grad_bias` hold a
// float a channel. The same for any number of threads.
void group_norm_silu_backward(const GroupNorm &norm, const float *stats, const void *grad_out, const void *grad_y, const void *x,
                              void *grad_x, float *grad_weight, float *grad_bias, bool is_bfloat16, int threads);

#ifdef STELLAR_FAST_CUDA
// Floats that both directions need at `workspace`.
size_t group_norm_silu_workspace_cuda(const GroupNorm &norm);
void group_norm_silu_forward_cuda(const Launch &launch, const GroupNorm &norm, const void *x, const void *residual, void *y, float *stats,
                                  bool given, void *out, Dtype dtype, float *workspace);
void group_norm_silu_backward_cuda(const Launch &launch, const GroupNorm &norm, const float *stats, const void *grad_out,
                                   const void *grad_y, const void *x, void *grad_x, float *grad_weight, float *grad_bias, Dtype dtype,
                                   float *workspace);
#endif

}  // namespace stellar_fast
