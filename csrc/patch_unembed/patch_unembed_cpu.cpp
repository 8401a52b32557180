// The products are oneDNN's; here is what they have not: patches into an image and back. A task is a band, which stays in the first-level
// cache while each of its patches, one piece of memory, is laid into it.
#include "patch_unembed/patch_unembed.h"

#include "common/vec.h"

namespace stellar_fast {
namespace {

struct Band {
  const PatchGrid &grid;
  ptrdiff_t image, channel, row;

  // Bands that share patches follow each other.
  Band(const PatchGrid &grid, ptrdiff_t task)
      : grid(grid), image(task / grid.channels / grid.rows), channel(task % grid.channels), row(task / grid.channels % grid.rows) {}

  ptrdiff_t side() const { return grid.side; }
  ptrdiff_t width() const { return side() * grid.columns; }
  ptrdiff_t index() const { return (image * grid.channels + channel) * grid.rows + row; }
  ptrdiff_t pixels() const { return index() * side() * width(); }
  ptrdiff_t patch_stride() const { return grid.channels * side() * side(); }
  ptrdiff_t patches() const { return ((image * grid.rows + row) * grid.columns * grid.channels + channel) * side() * side(); }
};

// One row of a patch, in vectors of V; the last one overlaps the one before it, and writes the same again.
template <int V, typename T>
STELLAR_FAST_INLINE void copy_row(const T *from, T *to, int side, float bias) {
  int i = 0;
  for (; i + V <= side; i += V) store<V>(to + i, load<V>(from + i) + bias);
  if (i < side) store<V>(to + side - V, load<V>(from + side - V) + bias);
}

template <int V, typename T>
STELLAR_FAST_INLINE void unpack_band(const Band &band, const T *patches, float bias, T *image) {
  const int side = band.grid.side;
  for (int column = 0; column < band.grid.columns; ++column, patches += band.patch_stride(), image += side)
    for (int i = 0; i < side; ++i) {
      const T *from = patches + ptrdiff_t(i) * side;
      T *to = image + i * band.width();
      if constexpr (V > 1)
        copy_row<V>(from, to, side, bias);
      else
        for (int j = 0; j < side; ++j) from_float(to + j, to_float(from[j]) + bias);
    }
}

template <int V, typename T>
STELLAR_FAST_INLINE float pack_band(const Band &band, const T *image, T *patches) {
  const int side = band.grid.side;
  float total = 0;
  f32v<V> sums[2]{};  // of even and of odd rows: one alone would wait for the latency of each addition
  for (int column = 0; column < band.grid.columns; ++column, patches += band.patch_stride(), image += side)
    for (int i = 0; i < side; ++i) {
      const T *from = image + i * band.width();
      T *to = patches + ptrdiff_t(i) * side;
      int j = 0;
      for (; j + V <= side; j += V) {
        const f32v<V> pixels = load<V>(from + j);
        sums[i % 2] += pixels;
        store<V>(to + j, pixels);
      }
      for (; j < side; ++j) {
        total += to_float(from[j]);
        to[j] = from[j];
      }
    }
  return total + sum<V>(sums[0] + sums[1]);
}

template <int W, typename T>
STELLAR_FAST_INLINE void unpack_band_of(const Band &band, const T *patches, const T *bias, T *image) {
  const int side = band.grid.side;
  const float add = bias ? to_float(bias[band.channel]) : 0.0f;
  patches += band.patches();
  image += band.pixels();
  if (side >= W) return unpack_band<W>(band, patches, add, image);
  if (W > 8 && side >= 8) return unpack_band<8>(band, patches, add, image);
  if (W > 4 && side >= 4) return unpack_band<4>(band, patches, add, image);
  unpack_band<1>(band, patches, add, image);
}

template <int W, typename T>
STELLAR_FAST_INLINE void pack_band_of(const Band &band, const T *image, T *patches, float *sums) {
  const int side = band.grid.side;
  image += band.pixels();
  patches += band.patches();
  float &sum = sums[band.index()];
  if (side >= W)
    sum = pack_band<W>(band, image, patches);
  else if (W > 8 && side >= 8)
    sum = pack_band<8>(band, image, patches);
  else
    sum = pack_band<4>(band, image, patches);
}

template <int W>
STELLAR_FAST_INLINE void forward_body(const Band &band, const void *patches, const void *bias, void *image, bool is_bfloat16) {
  if (is_bfloat16)
    unpack_band_of<W>(band, (const bfloat16 *)patches, (const bfloat16 *)bias, (bfloat16 *)image);
  else
    unpack_band_of<W>(band, (const float *)patches, (const float *)bias, (float *)image);
}

template <int W>
STELLAR_FAST_INLINE void backward_body(const Band &band, const void *image, void *patches, float *sums, bool is_bfloat16) {
  if (is_bfloat16)
    pack_band_of<W>(band, (const bfloat16 *)image, (bfloat16 *)patches, sums);
  else
    pack_band_of<W>(band, (const float *)image, (float *)patches, sums);
}

STELLAR_FAST_BY_LEVEL(forward, (const Band &band, const void *patches, const void *bias, void *image, bool is_bfloat16),
                      (band, patches, bias, image, is_bfloat16))
STELLAR_FAST_BY_LEVEL(backward, (const Band &band, const void *image, void *patches, float *sums, bool is_bfloat16),
                      (band, image, patches, sums, is_bfloat16))

ptrdiff_t bands(const PatchGrid &grid) { return ptrdiff_t(grid.images) * grid.channels * grid.rows; }

}  // namespace

void patch_unembed_forward(const PatchGrid &grid, const void *patches, const void *bias, void *image, bool is_bfloat16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (ptrdiff_t task = 0; task < bands(grid); ++task) forward(Band(grid, task), patches, bias, image, is_bfloat16);
}

void patch_unembed_backward(const PatchGrid &grid, const void *image, void *patches, float *sums, bool is_bfloat16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (ptrdiff_t task = 0; task < bands(grid); ++task) backward(Band(grid, task), image, patches, sums, is_bfloat16);
}

}  // namespace stellar_fast
