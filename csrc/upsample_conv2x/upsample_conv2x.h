#pragma once

#include <cstddef>

#include "common/launch.h"

namespace stellar_fast {

// An image of height x width pixels becomes one of 2 height x 2 width; everything is dense, the channels innermost. In `phases`, of
// (height + 1) x (width + 1) x 2 x 2 x channels, output pixel (y, x) is phases[(y + 1) / 2][(x + 1) / 2][y % 2][x % 2]: what a convolution
// of the small image with 2x2 taps, padding 1 and 4 `channels` computes. Two of its rows and two of its columns hold no output pixel.
struct Upsampled {
  int images, height, width, channels;
};

// Columns of a panel of the weights of upsample_conv2x_products, and what the last panel's are a multiple of.
constexpr int kUpsamplePanel = 64, kUpsampleColumns = 16;

// out = phases + bias. `bias` may be null; `stats` (images x groups x (mean, biased variance)), of the values as `out` holds them, is
// written where groups > 0. The same every time, for any number of threads.
void upsample_conv2x_interleave(const Upsampled &size, const void *phases, const float *bias, void *out, int groups, float *stats,
                                bool is_bfloat16, int threads);

// The operator itself by 9 products a pixel, where the phases have 16: x (images, height, width, in_channels), `weights` panels of output
// channels, each (9, in_channels, its width), in bfloat16 (9, pairs of in_channels, its width, 2); kernels/upsample_conv2x/phases.py makes
// them. bfloat16 only where the processor multiplies it.
bool upsample_conv2x_multiplies_bf16();
void upsample_conv2x_products(const Upsampled &size, const void *x, int in_channels, const void *weights, const float *bias, void *out,
                              int groups, float *stats, bool is_bfloat16, int threads);

// The gradient of the phases, zero where no output pixel is, and of the bias (`channels` floats).
void upsample_conv2x_split(const Upsampled &size, const void *grad_out, void *grad_phases, float *grad_bias, bool is_bfloat16, int threads);

#ifdef STELLAR_FAST_CUDA
// An image's pixels are summed in this many chunks, so that both passes below want scratch memory of (images, chunks, channels): pairs of
// floats for the statistics (none without), and floats where the split leaves the sums whose total is the gradient of the bias.
int upsample_conv2x_chunks_cuda(const Upsampled &size, Dtype dtype);

void upsample_conv2x_interleave_cuda(const Launch &launch, const Upsampled &size, const void *phases, const float *bias, void *out,
                                     int groups, float *stats, float *scratch, Dtype dtype);

void upsample_conv2x_split_cuda(const Launch &launch, const Upsampled &size, const void *grad_out, void *grad_phases, float *scratch,
                                Dtype dtype);
#endif

}  // namespace stellar_fast
