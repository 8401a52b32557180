#pragma once

#include <cstdint>

#include "common/pairs.h"

namespace stellar_fast {

constexpr int kTokenMatchMaxTokens = 64;

// Entropic optimal transport between the tokens of each view and those of its image. `target` has one view an image.
struct TokenMatch {
  int images, views, tokens, width;
  Tokens pred, target;
  const uint8_t *keep;  // (images, tokens), 0 sets a target's cost to twice the largest of all costs; or null
  float epsilon;
  int iterations;
  int64_t *index;  // (images, views, tokens)
  float *plan;     // (images, views, tokens, tokens), or null
};

void token_match(const TokenMatch &call, int threads);

}  // namespace stellar_fast
