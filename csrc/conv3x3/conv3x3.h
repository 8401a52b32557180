#pragma once

#include <cstddef>

namespace stellar_fast {

// Images of height x width pixels, dense, the channels innermost.
struct Convolved {
  int images, height, width, in_channels, channels;
};

// Columns of a panel of the transformed weights, and what the last panel's are a multiple of.
constexpr int kConvPanel = 64, kConvColumns = 16;

// out = the 3x3 convolution of x (zeros around the image) + bias + residual, by 16 products for each 2x2 pixels of the output. `weight`:
// (channels, 3, 3, in_channels). `panels`: memory for 16 x in_channels floats for each output channel, of which there are taken to be a
// multiple of kConvColumns. `bias` and `residual` may be null; `out` may be the residual's memory, but not x's. `stats` (images x groups x
// (mean, biased variance)), of the values as `out` holds them, is written where groups > 0. The same every time, for any number of threads.
void conv3x3(const Convolved &size, const float *x, const float *weight, float *panels, const float *bias, const float *residual,
             float *out, int groups, float *stats, int threads);

}  // namespace stellar_fast
