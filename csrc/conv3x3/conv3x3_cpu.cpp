// Winograd's F(2x2, 3x3): with d the 4x4 pixels that a tile of 2x2 outputs reads, w the taps and
//   Bt = | 1  0 -1  0 |   G = |  1    0    0  |   At = | 1  1  1  0 |
//        | 0  1  1  0 |       | 1/2  1/2  1/2 |        | 0  1 -1 -1 |
//        | 0 -1  1  0 |       | 1/2 -1/2  1/2 |
//        | 0  1  0 -1 |       |  0    0    1  |
// the tile is At [(G w Gt) * (Bt d B)] A: 16 products for each pair of channels, where the plain formula has 36. Each is a product of
// matrices over a run of tiles. G w Gt is made in each call: kept, it would be 1.8 times the weights, and it costs 2% of a call (docs/log.md). A task is such a run: what it writes and sums is its own, and sums are combined in the order of the tasks.
#include "conv3x3/conv3x3.h"

#include <algorithm>
#include <vector>

#include "common/allocator.h"
#include "common/gemm.h"
#include "common/moments.h"
#include "common/pairs.h"
#include "common/vec.h"

namespace stellar_fast {
namespace {

constexpr int kProducts = 16;
// Of a run: each panel of the weights comes from the third-level cache once a run, so that many are few bytes a product. On a Zen 5 48
// to 192 are as fast at 128 and 256 channels; at 512 those above 120 are 5% faster than 96, and 48 15% slower.
constexpr int kTiles = 128;
constexpr int kFewTiles = 32;  // where that leaves several tasks
constexpr int kRows = 6;       // of a block in registers, so that runs are its multiples
constexpr int kDepth = 128;    // of channels at a time: with kConvPanel columns of the weights 32 KiB, for the first-level cache
constexpr int kOffset = 16;    // between maps whose size may be a power of two: else all would share a few sets of the caches

struct Convolution {
  Convolved size;
  const float *x, *panels, *bias, *residual;
  float *out;
  int across, tiles, runs, run;  // tiles in a row and in an image; runs of an image, and tiles in one
};

// Equal runs of at most kTiles, and of fewer where images are small, for several tasks; whatever the number of threads, because sums
// depend on them.
Convolution convolution(const Convolved &size, const float *x, const float *panels, const float *bias, const float *residual, float *out) {
  const int across = (size.width + 1) / 2, tiles = (size.height + 1) / 2 * across;
  const int most = std::max(kFewTiles, int(std::min(ptrdiff_t(size.images) * tiles / 4, ptrdiff_t(kTiles))));
  const int some = (tiles + most - 1) / most;
  const int run = ((tiles + some - 1) / some + kRows - 1) / kRows * kRows;
  return {size, x, panels, bias, residual, out, across, tiles, (tiles + run - 1) / run, run};
}

// G w Gt of W output channels: taps[3 i + j] to the rows of a panel, of which one product's are `size` floats from those of the next.
template <int W>
STELLAR_FAST_INLINE void transform_taps(const float (*taps)[kConvColumns], float *to, ptrdiff_t size) {
  f32v<W> rows[3][4];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const f32v<W> first = load<W>(taps[3 * i]), middle = load<W>(taps[3 * i + 1]), last = load<W>(taps[3 * i + 2]), outer = first + last;
    rows[i][0] = first;
    rows[i][1] = (outer + middle) * 0.5f;
    rows[i][2] = (outer - middle) * 0.5f;
    rows[i][3] = last;
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const f32v<W> outer = rows[0][j] + rows[2][j];
    store<W>(to + j * size, rows[0][j]);
    store<W>(to + (4 + j) * size, (outer + rows[1][j]) * 0.5f);
    store<W>(to + (8 + j) * size, (outer - rows[1][j]) * 0.5f);
    store<W>(to + (12 + j) * size, rows[2][j]);
  }
}

// Of a panel what comes of kConvColumns output channels, from `channel` on; zeros where there are fewer.
template <int W>
STELLAR_FAST_INLINE void make_columns_body(const Convolved &s, const float *weight, float *panels, int channel) {
  constexpr int kBlock = 16;  // input channels: a line of the cache
  const int C = s.in_channels, panel = channel / kConvPanel * kConvPanel, valid = std::min(kConvColumns, s.channels - channel);
  const int width = std::min(kConvPanel, (s.channels - panel + kConvColumns - 1) / kConvColumns * kConvColumns);
  float *to = panels + ptrdiff_t(kProducts) * C * panel + (channel - panel);
  alignas(64) float taps[kBlock][9][kConvColumns] = {};
  for (int c = 0; c < C; c += kBlock) {
    const int n = std::min(kBlock, C - c);
    for (int o = 0; o < valid; ++o)
      for (int tap = 0; tap < 9; ++tap) {
        const float *from = weight + (ptrdiff_t(channel + o) * 9 + tap) * C + c;
        for (int k = 0; k < n; ++k) taps[k][tap][o] = from[k];
      }
    for (int k = 0; k < n; ++k)
      for (int o = 0; o < kConvColumns; o += W)
        transform_taps<W>((const float(*)[kConvColumns])(taps[k][0] + o), to + ptrdiff_t(c + k) * width + o, ptrdiff_t(C) * width);
  }
}
STELLAR_FAST_BY_LEVEL(make_columns, (const Convolved &s, const float *weight, float *panels, int channel), (s, weight, panels, channel))

size_t map_size(const Convolution &p) { return pad(size_t(p.run) * p.size.in_channels) + kOffset; }
size_t product_size(const Convolution &p) { return size_t(p.run) * kConvPanel + kOffset; }
size_t scratch_size(const Convolution &p) {
  return channel_sums_size(p.size.channels) + kProducts * (map_size(p) + product_size(p)) + pad(p.size.in_channels);
}

struct Scratch {
  ChannelSums sums;
  float *maps, *products, *zeros;
};

Scratch scratch_of(const Convolution &p, float *memory) {
  float *maps = memory + channel_sums_size(p.size.channels), *products = maps + kProducts * map_size(p);
  float *zeros = products + kProducts * product_size(p);
  std::fill_n(zeros, p.size.in_channels, 0.0f);
  return {channel_sums(memory, p.size.channels), maps, products, zeros};
}

struct Run {
  int image, first, count;
};

Run run_of(const Convolution &p, int task) {
  const int first = task % p.runs * p.run;
  return {task / p.runs, first, std::min(p.run, p.tiles - first)};
}

// Bt d B of the channels from c on; pixels and maps of a tile.
template <int W>
STELLAR_FAST_INLINE void make_maps_at(const float *const *pixels, float *map, size_t size, int c, int n) {
  f32v<W> rows[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const f32v<W> d0 = load_first<W>(pixels[j] + c, n), d1 = load_first<W>(pixels[4 + j] + c, n);
    const f32v<W> d2 = load_first<W>(pixels[8 + j] + c, n), d3 = load_first<W>(pixels[12 + j] + c, n);
    rows[0][j] = d0 - d2;
    rows[1][j] = d1 + d2;
    rows[2][j] = d2 - d1;
    rows[3][j] = d1 - d3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    float *to = map + 4 * i * size + c;
    store_first<W>(to, rows[i][0] - rows[i][2], n);
    store_first<W>(to + size, rows[i][1] + rows[i][2], n);
    store_first<W>(to + 2 * size, rows[i][2] - rows[i][1], n);
    store_first<W>(to + 3 * size, rows[i][1] - rows[i][3], n);
  }
}

template <int W>
STELLAR_FAST_INLINE void make_maps(const Convolution &p, const Run &r, const Scratch &scratch) {
  const Convolved &s = p.size;
  const int C = s.in_channels;
  const size_t size = map_size(p);
  const float *x = p.x + ptrdiff_t(r.image) * s.height * s.width * C;
  for (int t = 0; t < r.count; ++t) {
    const int top = (r.first + t) / p.across * 2 - 1, left = (r.first + t) % p.across * 2 - 1;
    const float *pixels[16];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const bool inside = top + i >= 0 && top + i < s.height && left + j >= 0 && left + j < s.width;
        pixels[4 * i + j] = inside ? x + (ptrdiff_t(top + i) * s.width + left + j) * C : scratch.zeros;
      }
    float *map = scratch.maps + ptrdiff_t(t) * C;
    int c = 0;
    for (; c + W <= C; c += W) make_maps_at<W>(pixels, map, size, c, W);
    if (c < C) make_maps_at<W>(pixels, map, size, c, C - c);
  }
}

// At m A + bias + residual of the n channels from c on, for the pixels of a tile that are in the image. from: of the products, to: of out.
template <int W>
STELLAR_FAST_INLINE void write_tile_at(const Convolution &p, const Scratch &scratch, const float *from, int c, int n, ptrdiff_t to,
                                       int rows, int columns, bool summed, bool is_first) {
  const size_t size = product_size(p);
  const ptrdiff_t row_stride = ptrdiff_t(p.size.width) * p.size.channels;
  f32v<W> sums[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const f32v<W> m0 = load<W>(from + j * size), m1 = load<W>(from + (4 + j) * size);
    const f32v<W> m2 = load<W>(from + (8 + j) * size), m3 = load<W>(from + (12 + j) * size);
    sums[0][j] = m0 + m1 + m2;
    sums[1][j] = m1 - m2 - m3;
  }
  const f32v<W> bias = p.bias ? load_first<W>(p.bias + c, n) : f32v<W>{};
#pragma GCC unroll 2
  for (int a = 0; a < 2; ++a) {
    const f32v<W> *m = sums[a];
    f32v<W> values[2] = {m[0] + m[1] + m[2] + bias, m[1] - m[2] - m[3] + bias};
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      if (a >= rows || b >= columns) continue;
      const ptrdiff_t at = to + a * row_stride + b * p.size.channels + c;
      if (p.residual) values[b] += load_first<W>(p.residual + at, n);
      store_first<W>(p.out + at, values[b], n);
      if (summed) add_values<W>(scratch.sums, c, values[b], is_first && a + b == 0);
    }
  }
}

template <int W>
STELLAR_FAST_INLINE void write_panel(const Convolution &p, const Run &r, const Scratch &scratch, int channel, int width, bool summed) {
  const Convolved &s = p.size;
  const int valid = std::min(width, s.channels - channel);
  for (int t = 0; t < r.count; ++t) {
    const int top = (r.first + t) / p.across * 2, left = (r.first + t) % p.across * 2;
    const int rows = std::min(2, s.height - top), columns = std::min(2, s.width - left);
    const ptrdiff_t to = ((ptrdiff_t(r.image) * s.height + top) * s.width + left) * s.channels;
    const float *from = scratch.products + ptrdiff_t(t) * width;
    int c = 0;
    if (rows == 2 && columns == 2)
      for (; c + W <= valid; c += W) write_tile_at<W>(p, scratch, from + c, channel + c, W, to, 2, 2, summed, t == 0);
    for (; c < valid; c += W)
      write_tile_at<W>(p, scratch, from + c, channel + c, std::min(W, valid - c), to, rows, columns, summed, t == 0);
  }
}

template <int W>
STELLAR_FAST_INLINE void convolve_run_body(const Convolution &p, const Run &r, const Scratch &scratch, bool summed) {
  const int C = p.size.in_channels;
  make_maps<W>(p, r, scratch);
  const float *panel = p.panels;
  for (int channel = 0; channel < p.size.channels; channel += kConvPanel) {
    const int width = std::min(kConvPanel, (p.size.channels - channel + kConvColumns - 1) / kConvColumns * kConvColumns);
    for (int i = 0; i < kProducts; ++i)
      for (int c = 0; c < C; c += kDepth) {
        const int depth = std::min(kDepth, C - c);
        gemm<W>(scratch.maps + i * map_size(p) + c, C, 1, panel, width, scratch.products + i * product_size(p), width, r.count, width,
                depth, c > 0);
        panel += ptrdiff_t(depth) * width;
      }
    write_panel<W>(p, r, scratch, channel, width, summed);
  }
}
STELLAR_FAST_BY_LEVEL(convolve_run, (const Convolution &p, const Run &r, const Scratch &scratch, bool summed), (p, r, scratch, summed))

// Pixels of a run: tiles at the last row or column of an odd side have one of them less.
double pixels_of(const Convolution &p, const Run &r) {
  double pixels = 0;
  for (int t = r.first; t < r.first + r.count; ++t)
    pixels += std::min(2, p.size.height - t / p.across * 2) * std::min(2, p.size.width - t % p.across * 2);
  return pixels;
}

}  // namespace

void conv3x3(const Convolved &size, const float *x, const float *weight, float *panels, const float *bias, const float *residual,
             float *out, int groups, float *stats, int threads) {
  const Convolution call = convolution(size, x, panels, bias, residual, out);
  const int tasks = size.images * call.runs, workers = std::max(1, std::min(threads, tasks));
  if (out != residual) expect_first_write(out, size_t(size.images) * size.height * size.width * size.channels * sizeof(float));
  std::vector<Moments> moments(size_t(tasks) * groups);
  const int parts = (size.channels + kConvColumns - 1) / kConvColumns;
#pragma omp parallel for num_threads(std::max(1, std::min(threads, parts))) schedule(static)
  for (int part = 0; part < parts; ++part) make_columns(size, weight, panels, part * kConvColumns);
#pragma omp parallel num_threads(workers)
  {
    const AlignedFloats memory(scratch_size(call));
    const Scratch scratch = scratch_of(call, memory.get());
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      const Run run = run_of(call, task);
      convolve_run(call, run, scratch, groups > 0);
      if (groups) group_moments(scratch.sums, size.channels, groups, pixels_of(call, run), &moments[size_t(task) * groups]);
    }
  }
  if (groups) write_stats(moments, size.images, call.runs, groups, stats);
}

}  // namespace stellar_fast
