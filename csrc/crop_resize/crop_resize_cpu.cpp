// The pass across the width works on a transposed image, so that both passes are sums of whole rows with one weight a row, which the
// compiler vectorises. The image is transposed once for all crops: row 3 * x + channel of the result holds one colour of column x.
#include "crop_resize/crop_resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "common/simd.h"

namespace stellar_fast {
namespace {

constexpr int kBlock = 16;      // side of a transposed block
constexpr int kPad = 32;        // rows of the work planes are computed in whole vectors, without a slow scalar remainder
constexpr int kMaxTaps = 8;     // rows added in one sweep
constexpr double kSupport = 2;  // of the bicubic kernel, in output pixels (input pixels when enlarging)

int pad(int n) { return (n + kPad - 1) / kPad * kPad; }

// A work plane of bytes. A padded row that starts inside it ends inside it; the padding is computed with and never used.
struct Plane {
  Plane(int rows, int row_size) : stride(pad(row_size)), bytes(new uint8_t[size_t(pad(rows) + 1) * stride]()) {}
  uint8_t *row(int index) const { return bytes.get() + size_t(index) * stride; }
  ptrdiff_t stride;
  std::unique_ptr<uint8_t[]> bytes;
};

// Weights of one axis: output row j is the sum over k of weights[j * taps + k] times input row first[j] + k.
struct Filter {
  int taps;
  std::vector<int> first;
  std::vector<float> weights;
};

float bicubic(float x) {
  x = std::fabs(x);
  const float near = (1.5f * x - 2.5f) * x * x + 1.0f;
  const float far = ((-0.5f * x + 2.5f) * x - 4.0f) * x + 2.0f;
  return x < 1.0f ? near : x < 2.0f ? far : 0.0f;
}

STELLAR_FAST_SIMD_CLONES
Filter make_filter(int in_size, int out_size) {
  const double scale = double(in_size) / out_size;
  const double stretch = std::max(scale, 1.0);  // antialiasing: the kernel covers `scale` input pixels when shrinking
  const double support = kSupport * stretch;
  Filter filter;
  const int taps = filter.taps = std::min(int(std::ceil(2 * support)), in_size);
  filter.first.resize(out_size);
  filter.weights.resize(size_t(out_size) * taps);
  const float inverse = float(1 / stretch);
  for (int j = 0; j < out_size; ++j) {
    const double centre = (j + 0.5) * scale - 0.5;
    const int first = std::clamp(int(std::ceil(centre - support)), 0, in_size - taps);
    const float offset = float(first - centre);
    float *w = &filter.weights[size_t(j) * taps];
    for (int k = 0; k < taps; ++k) w[k] = bicubic((float(k) + offset) * inverse);
    float sum = 0;
    for (int k = 0; k < taps; ++k) sum += w[k];
    for (int k = 0; k < taps; ++k) w[k] /= sum;
    filter.first[j] = first;
  }
  return filter;
}

// One sweep of up to kMaxTaps rows: from + sum of weights[k] * row k, kept as floats in `sums` or, at last, as bytes in `out`.
template <int kTaps, bool kLast>
inline __attribute__((always_inline)) void sweep(const uint8_t *__restrict in, ptrdiff_t stride, const float *__restrict weights,
                                                 const float *from, float *sums, uint8_t *__restrict out, int width) {
  for (int x = 0; x < width; ++x) {
    float sum = from[x];
    for (int k = 0; k < kTaps; ++k) sum += weights[k] * float(in[k * stride + x]);
    if (kLast) {
      const int level = int(sum);  // clamped as an integer: NaN rules keep compilers from the float minimum and maximum
      out[x] = uint8_t(level < 0 ? 0 : level > 255 ? 255 : level);
    } else {
      sums[x] = sum;
    }
  }
}

STELLAR_FAST_SIMD_CLONES
void resample_rows(const Filter &filter, const uint8_t *in, ptrdiff_t in_stride, int width, uint8_t *out, ptrdiff_t out_stride) {
  const std::vector<float> halves(width, 0.5f);  // rounds to nearest where the sum is cut to a byte
  std::vector<float> sums(width);
  const int rows = int(filter.first.size());
  for (int j = 0; j < rows; ++j) {
    const uint8_t *row = in + filter.first[j] * in_stride;
    const float *weights = &filter.weights[size_t(j) * filter.taps];
    const float *from = halves.data();
    int taps = filter.taps;
    for (; taps > kMaxTaps; taps -= kMaxTaps, row += kMaxTaps * in_stride, weights += kMaxTaps) {
      sweep<kMaxTaps, false>(row, in_stride, weights, from, sums.data(), nullptr, width);
      from = sums.data();
    }
    uint8_t *to = out + j * out_stride;
    switch (taps) {
      case 1: sweep<1, true>(row, in_stride, weights, from, nullptr, to, width); break;
      case 2: sweep<2, true>(row, in_stride, weights, from, nullptr, to, width); break;
      case 3: sweep<3, true>(row, in_stride, weights, from, nullptr, to, width); break;
      case 4: sweep<4, true>(row, in_stride, weights, from, nullptr, to, width); break;
      case 5: sweep<5, true>(row, in_stride, weights, from, nullptr, to, width); break;
      case 6: sweep<6, true>(row, in_stride, weights, from, nullptr, to, width); break;
      case 7: sweep<7, true>(row, in_stride, weights, from, nullptr, to, width); break;
      default: sweep<8, true>(row, in_stride, weights, from, nullptr, to, width); break;
    }
  }
}

using Bytes = uint8_t __attribute__((vector_size(kBlock)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC knows that name from version 12 only
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
#endif

// Four rounds of interleaving row i with row i + 8 transpose a 16 x 16 block.
inline void transpose_block(Bytes *rows) {
  Bytes next[kBlock];
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < kBlock / 2; ++i) {
      const Bytes a = rows[i], b = rows[i + kBlock / 2];
      next[2 * i] = SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::copy(next, next + kBlock, rows);
  }
}

// out must have padded rows and a padded stride; what lies beyond (columns, rows) of it becomes undefined.
void transpose(const uint8_t *in, ptrdiff_t in_stride, int rows, int columns, const Plane &out) {
  Bytes block[kBlock] = {};
  for (int y = 0; y < rows; y += kBlock) {
    const int height = std::min(kBlock, rows - y);
    for (int x = 0; x < columns; x += kBlock) {
      const uint8_t *corner = in + y * in_stride + x;
      if (height == kBlock && x + kBlock <= columns) {
        for (int i = 0; i < kBlock; ++i) std::memcpy(&block[i], corner + i * in_stride, kBlock);
      } else {  // the bytes beyond the border may not be ours to read
        for (int i = 0; i < height; ++i) std::memcpy(&block[i], corner + i * in_stride, std::min(kBlock, columns - x));
      }
      transpose_block(block);
      for (int i = 0; i < kBlock; ++i) std::memcpy(out.row(x + i) + y, &block[i], kBlock);
    }
  }
}

// The smallest box that holds all crops.
Box bounds(const Box *boxes, int count) {
  Box all = boxes[0];
  for (int i = 1; i < count; ++i) {
    const int bottom = std::max(all.top + all.height, boxes[i].top + boxes[i].height);
    const int right = std::max(all.left + all.width, boxes[i].left + boxes[i].width);
    all.top = std::min(all.top, boxes[i].top);
    all.left = std::min(all.left, boxes[i].left);
    all.height = bottom - all.top;
    all.width = right - all.left;
  }
  return all;
}

}  // namespace

void crop_resize(const uint8_t *image, ptrdiff_t row_stride, const Box *boxes, const uint8_t *flips, int count, int size,
                 uint8_t *out) {
  if (count == 0) return;
  const Box all = bounds(boxes, count);
  const Plane columns(3 * all.width, all.height);
  transpose(image + all.top * row_stride + 3 * all.left, row_stride, all.height, 3 * all.width, columns);

  const Plane narrow(size, all.height);  // one colour of one crop, columns resized, still transposed
  const Plane rows(all.height, size);    // the same, upright
  for (int i = 0; i < count; ++i) {
    const Box &box = boxes[i];
    const Filter across = make_filter(box.width, size), down = make_filter(box.height, size);
    for (int channel = 0; channel < 3; ++channel, out += size_t(size) * size) {
      const uint8_t *in = columns.row(3 * (box.left - all.left) + channel) + (box.top - all.top);
      uint8_t *first = flips[i] ? narrow.row(size - 1) : narrow.row(0);
      resample_rows(across, in, 3 * columns.stride, pad(box.height), first, flips[i] ? -narrow.stride : narrow.stride);
      transpose(narrow.row(0), narrow.stride, size, box.height, rows);
      resample_rows(down, rows.row(0), rows.stride, size, out, size);
    }
  }
}

}  // namespace stellar_fast
