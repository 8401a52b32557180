#pragma once

#include <cstdint>

#include "common/pairs.h"

namespace stellar_fast {

constexpr int kKoleoMaxTokens = 64;
constexpr float kKoleoEps = 1e-8f;  // the smallest norm, what is added to every difference and within the logarithm

// x: tokens of images, one view each. What the forward writes and the backward reads, of size (images, tokens):
//   index      nearest other token
//   distance   to it, between normalised tokens
//   norm       at least kKoleoEps
struct Koleo {
  int images, tokens, width;
  Tokens x;
  float min_distance;
  int64_t *index;
  float *distance, *norm;
};

// Returns the loss: the mean over all tokens of -log(distance / 2 + 1e-8), the distance at least min_distance.
float koleo_forward(const Koleo &call, int threads);

// Writes grad_x (images, tokens, width), dense and in x's dtype, for a gradient of the loss.
void koleo_backward(const Koleo &call, float grad_loss, void *grad_x, int threads);

}  // namespace stellar_fast
