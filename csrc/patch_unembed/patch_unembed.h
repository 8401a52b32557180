#pragma once

#ifdef STELLAR_FAST_CUDA
#include "common/launch.h"
#endif

namespace stellar_fast {

// Images of rows x columns patches, each of side x side pixels in every channel. A patch comes whole, (channels, side, side); a band is
// what a row of patches is in one channel of the image: side rows of pixels.
struct PatchGrid {
  int images, channels, rows, columns, side;
};

// image (images, channels, rows side, columns side) = patches (images, rows, columns, channels, side, side) + bias (channels), which may
// be null. All are dense and of one dtype.
void patch_unembed_forward(const PatchGrid &grid, const void *patches, const void *bias, void *image, bool is_bfloat16, int threads);

// The inverse without a bias; sums (images, channels, rows) are those of the bands' pixels.
void patch_unembed_backward(const PatchGrid &grid, const void *image, void *patches, float *sums, bool is_bfloat16, int threads);

#ifdef STELLAR_FAST_CUDA
void patch_unembed_forward_cuda(const Launch &launch, const PatchGrid &grid, const void *patches, const void *bias, void *image,
                                Dtype dtype);
void patch_unembed_backward_cuda(const Launch &launch, const PatchGrid &grid, const void *image, void *patches, float *sums, Dtype dtype);
#endif

}  // namespace stellar_fast
