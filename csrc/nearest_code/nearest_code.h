#pragma once

#include <cstddef>
#include <cstdint>

#include "common/launch.h"

namespace stellar_fast {

// `rows` vectors z and `codes` entries of a codebook, of `width` elements; strides between rows in elements, a row's own are contiguous.
// A distance that is NaN counts as the smallest, and of equal ones the lowest index is taken.
struct NearestCode {
  ptrdiff_t rows;
  int codes, width;
  const void *z;
  ptrdiff_t z_stride;
  const float *codebook;
  ptrdiff_t codebook_stride;
  int64_t *out;  // (rows)
};

void nearest_code(const NearestCode &call, bool is_bfloat16, int threads);

#ifdef STELLAR_FAST_CUDA
// The codebook is taken in `splits` parts; best and index (splits, rows) hold what each part found, squares (codes) the entries' |c|^2.
struct NearestCodeScratch {
  int splits;
  float *squares, *best;
  int32_t *index;
};

void nearest_code_cuda(const Launch &launch, const NearestCode &call, const NearestCodeScratch &scratch, Dtype dtype);
#endif

}  // namespace stellar_fast
