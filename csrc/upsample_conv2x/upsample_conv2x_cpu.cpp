// A task is a tile of the small image (products) or one of its rows (the passes over phases): what it writes and sums is its own, and sums
// are combined in the order of the tasks.
#include "upsample_conv2x/upsample_conv2x.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/allocator.h"
#include "common/gemm.h"
#include "common/gemm_bf16.h"
#include "common/moments.h"
#include "common/pairs.h"
#include "common/vec.h"

namespace stellar_fast {
namespace {

// Stores the first n elements, and returns them as they are stored.
template <int W, typename T>
STELLAR_FAST_INLINE f32v<W> store_rounded(T *to, f32v<W> value, int n) {
  T rounded[W];
  store<W>(rounded, value);
  store_first<W>(to, value, n);
  return load<W>(rounded);
}

// phases

struct Interleave {
  Upsampled size;
  const void *phases;
  const float *bias;
  void *out;
  bool is_bfloat16;
};

// The phase of output pixel (y, x), both of one image.
template <typename T>
STELLAR_FAST_INLINE T *phase_of(T *phases, const Upsampled &s, int y, int x) {
  return phases + ((ptrdiff_t((y + 1) / 2) * (s.width + 1) + (x + 1) / 2) * 4 + y % 2 * 2 + x % 2) * s.channels;
}

ptrdiff_t phases_size(const Upsampled &s) { return ptrdiff_t(s.height + 1) * (s.width + 1) * 4 * s.channels; }
ptrdiff_t out_size(const Upsampled &s) { return ptrdiff_t(s.height) * s.width * 4 * s.channels; }

template <int W, typename T>
STELLAR_FAST_INLINE void interleave_rows_of(const Interleave &p, int image, int row, const ChannelSums *sums) {
  const Upsampled &s = p.size;
  const int C = s.channels;
  const T *phases = static_cast<const T *>(p.phases) + image * phases_size(s);
  T *out = static_cast<T *>(p.out) + image * out_size(s) + ptrdiff_t(row) * 4 * s.width * C;
  for (int y = 2 * row; y < 2 * row + 2; ++y)
    for (int x = 0; x < 2 * s.width; ++x, out += C) {
      const T *phase = phase_of(phases, s, y, x);
      for (int c = 0; c < C; c += W) {
        const int n = std::min(W, C - c);
        f32v<W> value = load_first<W>(phase + c, n);
        if (p.bias) value += load_first<W>(p.bias + c, n);
        value = store_rounded<W>(out + c, value, n);
        if (sums) add_values<W>(*sums, c, value, y == 2 * row && x == 0);
      }
    }
}

template <int W>
STELLAR_FAST_INLINE void interleave_rows_body(const Interleave &p, int image, int row, const ChannelSums *sums) {
  if (p.is_bfloat16)
    interleave_rows_of<W, bfloat16>(p, image, row, sums);
  else
    interleave_rows_of<W, float>(p, image, row, sums);
}
STELLAR_FAST_BY_LEVEL(interleave_rows, (const Interleave &p, int image, int row, const ChannelSums *sums), (p, image, row, sums))

struct Split {
  Upsampled size;
  const void *grad_out;
  void *grad_phases;
  bool is_bfloat16;
};

// Row `row` of the phases, of 0 to height. `sums` (padded channels) are added to.
template <int W, typename T>
STELLAR_FAST_INLINE void split_row_of(const Split &p, int image, int row, float *sums) {
  const Upsampled &s = p.size;
  const int C = s.channels;
  const T *grad_out = static_cast<const T *>(p.grad_out) + image * out_size(s);
  T *to = static_cast<T *>(p.grad_phases) + image * phases_size(s) + ptrdiff_t(row) * (s.width + 1) * 4 * C;
  for (int column = 0; column <= s.width; ++column)
    for (int phase = 0; phase < 4; ++phase, to += C) {
      const int y = 2 * row - phase / 2, x = 2 * column - phase % 2;
      if (y < 0 || y >= 2 * s.height || x < 0 || x >= 2 * s.width) {
        std::fill_n(to, C, T{});
        continue;
      }
      const T *from = grad_out + (ptrdiff_t(y) * 2 * s.width + x) * C;
      for (int c = 0; c < C; c += W) {
        const int n = std::min(W, C - c);
        const f32v<W> value = load_first<W>(from + c, n);
        store_first<W>(to + c, value, n);
        store<W>(sums + c, load<W>(sums + c) + value);
      }
    }
}

template <int W>
STELLAR_FAST_INLINE void split_row_body(const Split &p, int image, int row, float *sums) {
  if (p.is_bfloat16)
    split_row_of<W, bfloat16>(p, image, row, sums);
  else
    split_row_of<W, float>(p, image, row, sums);
}
STELLAR_FAST_BY_LEVEL(split_row, (const Split &p, int image, int row, float *sums), (p, image, row, sums))

// products
//
// In one dimension, with taps w and differences d[i] = x[i] - x[i-1], the two phases are
//   out[2i] = (w0 + w1 + w2) x[i] - w0 d[i]      out[2i + 1] = (w0 + w1 + w2) x[i] + w2 d[i + 1]
// so that three products give two outputs where the phases take four; in two dimensions nine give four, and they are products of matrices.

constexpr int kTilePixels = 128;  // of the small image: the tile's maps and products stay in the second-level cache
constexpr int kProducts = 9, kMaps = 4;

struct Tiles {
  int rows, columns;  // of a tile, at most
  int down, across;   // tiles of an image
};

Tiles tiles_of(const Upsampled &s) {
  const int columns = std::min(s.width, kTilePixels), rows = std::max(1, std::min(s.height, kTilePixels / columns));
  return {rows, columns, (s.height + rows - 1) / rows, (s.width + columns - 1) / columns};
}

struct Products {
  Upsampled size;
  const void *x;
  int in_channels;
  const void *weights;
  const float *bias;
  void *out;
  bool is_bfloat16;
  Tiles tiles;
};

struct Tile {
  int image, top, left, rows, columns;
};

Tile tile_of(const Products &p, int task) {
  const Tiles &t = p.tiles;
  const int tile = task % (t.down * t.across), top = tile / t.across * t.rows, left = tile % t.across * t.columns;
  return {task / (t.down * t.across), top, left, std::min(t.rows, p.size.height - top), std::min(t.columns, p.size.width - left)};
}

// Elements of a pixel in a map: bfloat16 are multiplied in pairs, so that there is a zero behind an odd number.
int pitch_of(const Products &p) { return p.is_bfloat16 ? p.in_channels + p.in_channels % 2 : p.in_channels; }

// What a thread works in, in floats. Maps hold a tile with a row below and a column to the right of it; products that column too, so that
// the pixels of a tile are rows of one matrix.
size_t map_size(const Products &p) { return pad(size_t(p.tiles.rows + 1) * (p.tiles.columns + 1) * pitch_of(p) / (p.is_bfloat16 ? 2 : 1)); }
size_t product_size(const Products &p) { return size_t(p.tiles.rows) * (p.tiles.columns + 1) * kUpsamplePanel; }
size_t products_scratch(const Products &p) {
  return kMaps * map_size(p) + kProducts * product_size(p) + pad(p.in_channels) + channel_sums_size(p.size.channels);
}

struct Scratch {
  ChannelSums sums;
  float *products, *maps, *zeros;
};

Scratch scratch_of(const Products &p, float *memory) {
  float *products = memory + channel_sums_size(p.size.channels), *maps = products + kProducts * product_size(p);
  float *zeros = maps + kMaps * map_size(p);
  std::fill_n(zeros, p.in_channels, 0.0f);
  return {channel_sums(memory, p.size.channels), products, maps, zeros};
}

// maps: x, and its differences to the left, upwards, and of the ones upwards to the left. Beyond the image are zeros.
template <int W, typename T>
STELLAR_FAST_INLINE void make_maps(const Products &p, const Tile &t, const Scratch &scratch) {
  const Upsampled &s = p.size;
  const int C = p.in_channels, pitch = pitch_of(p);
  const T *x = static_cast<const T *>(p.x) + ptrdiff_t(t.image) * s.height * s.width * C, *zeros = reinterpret_cast<const T *>(scratch.zeros);
  const auto pixel = [&](int row, int column) __attribute__((always_inline)) {
    return row < 0 || row >= s.height || column < 0 || column >= s.width ? zeros : x + (ptrdiff_t(row) * s.width + column) * C;
  };
  T *to[kMaps];
  for (int i = 0; i < kMaps; ++i) to[i] = reinterpret_cast<T *>(scratch.maps + i * map_size(p));
  for (int row = t.top; row <= t.top + t.rows; ++row)
    for (int column = t.left; column <= t.left + t.columns; ++column) {
      const T *here = pixel(row, column), *before = pixel(row, column - 1);
      const T *above = pixel(row - 1, column), *corner = pixel(row - 1, column - 1);
      for (int c = 0; c < C; c += W) {
        const int n = std::min(W, C - c);
        const f32v<W> value = load_first<W>(here + c, n), across = value - load_first<W>(before + c, n);
        const f32v<W> up = load_first<W>(above + c, n);
        store_first<W>(to[0] + c, value, n);
        store_first<W>(to[1] + c, across, n);
        store_first<W>(to[2] + c, value - up, n);
        store_first<W>(to[3] + c, across - (up - load_first<W>(corner + c, n)), n);
      }
      for (int i = 0; i < kMaps; ++i) {
        if (pitch > C) to[i][C] = T{};
        to[i] += pitch;
      }
    }
}

// Product 3 u + v multiplies the map of differences upwards (u > 0) and to the left (v > 0); u and v are 1 in the phase at that pixel, 2
// in the one that reads the difference of the next.
template <typename T>
STELLAR_FAST_INLINE const T *map_of(const Products &p, const Tile &t, const Scratch &scratch, int u, int v) {
  const T *map = reinterpret_cast<const T *>(scratch.maps + ((u > 0) * 2 + (v > 0)) * map_size(p));
  return map + ((u == 2) * ptrdiff_t(t.columns + 1) + (v == 2)) * pitch_of(p);
}

int rows_of(const Tile &t) { return t.rows * (t.columns + 1) - 1; }

int panel_width(const Products &p, int channel) {
  const int padded = (p.size.channels - channel + kUpsampleColumns - 1) / kUpsampleColumns * kUpsampleColumns;
  return std::min(kUpsamplePanel, padded);
}

// Adds up the products of one panel of channels, and writes the tile's four phases.
template <int W, typename T>
STELLAR_FAST_INLINE void write_panel(const Products &p, const Tile &t, const Scratch &scratch, int channel, bool summed) {
  const Upsampled &s = p.size;
  const int C = s.channels, width = panel_width(p, channel), valid = std::min(width, C - channel);
  const size_t size = product_size(p);
  const float *bias = p.bias ? p.bias + channel : nullptr;
  T *out = static_cast<T *>(p.out) + t.image * out_size(s) + channel;
  for (int r = 0; r < t.rows; ++r)
    for (int q = 0; q < t.columns; ++q) {
      const float *from = scratch.products + (ptrdiff_t(r) * (t.columns + 1) + q) * width;
      T *to = out + (ptrdiff_t(t.top + r) * 2 * 2 * s.width + 2 * (t.left + q)) * C;
      for (int c = 0; c < valid; c += W) {
        const int n = std::min(W, valid - c);
        f32v<W> common = load<W>(from + c);
        if (bias) common += load_first<W>(bias + c, n);
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a) {
          const float *row = from + (3 + 3 * a) * size + c;
          const f32v<W> down = common + load<W>(row);
#pragma GCC unroll 2
          for (int b = 0; b < 2; ++b) {
            f32v<W> value = (down + load<W>(from + (1 + b) * size + c)) + load<W>(row + (1 + b) * size);
            value = store_rounded<W>(to + (ptrdiff_t(a) * 2 * s.width + b) * C + c, value, n);
            if (summed) add_values<W>(scratch.sums, channel + c, value, r + q + a + b == 0);
          }
        }
      }
    }
}

template <int W>
STELLAR_FAST_INLINE void multiply_tile_body(const Products &p, const Tile &t, const Scratch &scratch, bool summed) {
  make_maps<W, float>(p, t, scratch);
  const int C = p.in_channels;
  const float *weights = static_cast<const float *>(p.weights);
  for (int channel = 0; channel < p.size.channels; channel += kUpsamplePanel) {
    const int width = panel_width(p, channel);
    for (int i = 0; i < kProducts; ++i, weights += ptrdiff_t(C) * width)
      gemm<W>(map_of<float>(p, t, scratch, i / 3, i % 3), C, 1, weights, width, scratch.products + i * product_size(p), width, rows_of(t),
              width, C, false);
    write_panel<W, float>(p, t, scratch, channel, summed);
  }
}
STELLAR_FAST_BY_LEVEL(multiply_tile, (const Products &p, const Tile &t, const Scratch &scratch, bool summed), (p, t, scratch, summed))

#if STELLAR_FAST_HAS_BF16_DOT
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")

// The same on pairs of bfloat16, summed in fp32; the differences are rounded to it.
void multiply_tile_bf16(const Products &p, const Tile &t, const Scratch &scratch, bool summed) {
  make_maps<16, bfloat16>(p, t, scratch);
  const int pairs = pitch_of(p) / 2;
  const bf16_pair *weights = static_cast<const bf16_pair *>(p.weights);
  for (int channel = 0; channel < p.size.channels; channel += kUpsamplePanel) {
    const int width = panel_width(p, channel);
    for (int i = 0; i < kProducts; ++i, weights += ptrdiff_t(pairs) * width)
      gemm_bf16(reinterpret_cast<const bf16_pair *>(map_of<bfloat16>(p, t, scratch, i / 3, i % 3)), pairs, 1, weights, width,
                scratch.products + i * product_size(p), width, rows_of(t), width, pairs, false);
    write_panel<16, bfloat16>(p, t, scratch, channel, summed);
  }
}

#pragma GCC pop_options
#else
void multiply_tile_bf16(const Products &, const Tile &, const Scratch &, bool) {}
#endif

}  // namespace

void upsample_conv2x_interleave(const Upsampled &size, const void *phases, const float *bias, void *out, int groups, float *stats,
                                bool is_bfloat16, int threads) {
  const Interleave call{size, phases, bias, out, is_bfloat16};
  expect_first_write(out, size.images * out_size(size) * (is_bfloat16 ? sizeof(bfloat16) : sizeof(float)));
  const int tasks = size.images * size.height, workers = std::max(1, std::min(threads, tasks));
  const size_t scratch_size = channel_sums_size(size.channels);
  const AlignedFloats scratch(workers * scratch_size);
  std::vector<Moments> moments(size_t(tasks) * groups);
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int w = 0; w < workers; ++w) {
    const ChannelSums sums = channel_sums(scratch.get() + w * scratch_size, size.channels);
    for (int task = w; task < tasks; task += workers) {
      interleave_rows(call, task / size.height, task % size.height, groups ? &sums : nullptr);
      if (groups) group_moments(sums, size.channels, groups, 4.0 * size.width, &moments[size_t(task) * groups]);
    }
  }
  if (groups) write_stats(moments, size.images, size.height, groups, stats);
}

bool upsample_conv2x_multiplies_bf16() {
#if STELLAR_FAST_HAS_BF16_DOT
  return processor_has_bf16_dot();
#else
  return false;
#endif
}

void upsample_conv2x_products(const Upsampled &size, const void *x, int in_channels, const void *weights, const float *bias, void *out,
                              int groups, float *stats, bool is_bfloat16, int threads) {
  const Products call{size, x, in_channels, weights, bias, out, is_bfloat16, tiles_of(size)};
  const int tiles = call.tiles.down * call.tiles.across, tasks = size.images * tiles, workers = std::max(1, std::min(threads, tasks));
  expect_first_write(out, size.images * out_size(size) * (is_bfloat16 ? sizeof(bfloat16) : sizeof(float)));
  std::vector<Moments> moments(size_t(tasks) * groups);
#pragma omp parallel num_threads(workers)
  {
    const AlignedFloats memory(products_scratch(call));
    const Scratch scratch = scratch_of(call, memory.get());
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      const Tile tile = tile_of(call, task);
      (is_bfloat16 ? multiply_tile_bf16 : multiply_tile)(call, tile, scratch, groups > 0);
      if (groups) group_moments(scratch.sums, size.channels, groups, 4.0 * tile.rows * tile.columns, &moments[size_t(task) * groups]);
    }
  }
  if (groups) write_stats(moments, size.images, tiles, groups, stats);
}

void upsample_conv2x_split(const Upsampled &size, const void *grad_out, void *grad_phases, float *grad_bias, bool is_bfloat16, int threads) {
  const Split call{size, grad_out, grad_phases, is_bfloat16};
  const int rows = size.height + 1, tasks = size.images * rows, workers = std::max(1, std::min(threads, tasks));
  const size_t padded = pad(size.channels);
  const AlignedFloats sums(tasks * padded);  // of each task, so that they do not depend on the number of threads
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int w = 0; w < workers; ++w)
    for (int task = w; task < tasks; task += workers) {
      std::fill_n(sums.get() + task * padded, padded, 0.0f);
      split_row(call, task / rows, task % rows, sums.get() + task * padded);
    }
  for (int c = 0; c < size.channels; ++c) {
    double total = 0;
    for (int task = 0; task < tasks; ++task) total += sums.get()[task * padded + c];
    grad_bias[c] = float(total);
  }
}

}  // namespace stellar_fast
