#pragma once

#include <cstddef>
#include <cstdint>

namespace stellar_fast {

struct Box {
  int32_t top, left, height, width;
};

// Resizes `count` crops of one RGB image to size x size, bicubic (a = -0.5) and antialiased, each crop on its own: the filter
// never reads beyond the crop's border. Runs on the calling thread alone.
//   image   bytes of `row_stride` a row (negative is fine), RGB interleaved without gaps within a row
//   flips   one byte a crop: not 0 mirrors it left to right
//   out     count x 3 x size x size
// Every box must lie inside the image and be at least 1 x 1.
void crop_resize(const uint8_t *image, ptrdiff_t row_stride, const Box *boxes, const uint8_t *flips, int count, int size,
                 uint8_t *out);

}  // namespace stellar_fast
