#pragma once

#include <cstddef>
#include <cstdint>

namespace stellar_fast {

// A batch of matrices in memory: elements within a row lie side by side, strides count elements.
struct Matrices {
  const void *data;
  bool is_bfloat16;  // else float
  ptrdiff_t image_stride, row_stride;
};

struct LowrankShape {
  int images, patches, tokens, key_width, value_width;
};

constexpr int kLowrankMaxTokens = 64;
constexpr float kLowrankClampedScale = 1e7f;  // 1 / 1e-7: the scale of a row whose norm does not reach the epsilon

// out = softmax(logits) value + bias, logits = (query . key) * query_scale * key_scale / temperature. A scale is 1 / norm, or
// kLowrankClampedScale where the norm is at most 1e-7; at temperature 0 nothing is normalised and the logits are the dot
// products over sqrt(key_width): query_scale is 1 / sqrt(key_width) then and key_scale 1. All outputs are dense fp32.
struct LowrankForward {
  LowrankShape shape;
  Matrices query, key, value;
  const float *bias;  // patches x value_width, or nullptr
  float temperature;
  float *out;           // images x patches x value_width
  float *localization;  // images x patches x tokens, or nullptr: softmax(logits)
  float *peak;          // images x tokens: the largest localization over the patches
  float *logits;        // images x patches x tokens
  float *query_scale;   // images x patches
  float *key_scale;     // images x tokens
};
void lowrank_product_forward(const LowrankForward &call, int threads);

// Gradients of query, key and value, dense and in their dtypes, from what the forward kept. A clamped scale is a constant.
struct LowrankBackward {
  LowrankShape shape;
  Matrices grad_out;               // fp32
  const float *grad_localization;  // images x patches x tokens, or nullptr
  Matrices query, key, value;
  const float *logits, *query_scale, *key_scale;
  float temperature;
  void *grad_query, *grad_key, *grad_value;
};
void lowrank_product_backward(const LowrankBackward &call, int threads);

}  // namespace stellar_fast
