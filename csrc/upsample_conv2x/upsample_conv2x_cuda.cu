// A thread keeps one vector of channels and walks over pixels, so that its sums are in registers; a block is a chunk of pixels of an image
// by a slab of channels. Sums of a block go to scratch memory and are combined in order: the same every time.
#include <algorithm>

#include "common/check.h"
#include "common/cuda.cuh"
#include "upsample_conv2x/upsample_conv2x.h"

namespace stellar_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 16;     // of a thread
constexpr int kMostLanes = 64;  // threads side by side in the channels

template <typename T>
constexpr int kPack = 16 / sizeof(T);

// `pack` channels a thread, `lanes` threads in the channels; lanes divides kThreads.
struct Grid {
  int pack, lanes, chunk, chunks, slabs;
};

// Chunks of the pixels of the phases, which are more than those of the output: one number for both passes.
Grid grid_of(const Upsampled &s, int pack) {
  Grid g{s.channels % pack == 0 ? pack : 1, 1, 0, 0, 0};
  const int vectors = s.channels / g.pack;
  while (g.lanes < kMostLanes && g.lanes < vectors) g.lanes *= 2;
  g.chunk = kThreads / g.lanes * kPixels;
  g.chunks = int((4 * (long long)(s.height + 1) * (s.width + 1) + g.chunk - 1) / g.chunk);
  g.slabs = (vectors + g.lanes - 1) / g.lanes;
  return g;
}

dim3 blocks_of(const Upsampled &s, const Grid &g) {
  check((long long)s.images * g.chunks <= 0x7fffffff && g.slabs <= 65535, s.images, " images of ", s.height, " x ", s.width, " x ",
        s.channels, " are too many for one launch");
  return dim3(unsigned(s.images) * g.chunks, g.slabs);
}

struct Moments {
  float count, mean, squares;  // squares: of the distance to the mean, summed
};

__device__ inline Moments combined(const Moments &a, const Moments &b) {
  const float count = a.count + b.count;
  if (count == 0) return a;
  const float off = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + off * share, a.squares + b.squares + off * off * (a.count * share)};
}

// Pixels of a chunk that exist, of `total` of an image.
__device__ inline int pixels_of(int chunk, int size, int total) { return min(max(total - chunk * size, 0), size); }

template <typename T, int N, bool kStats>
__global__ void __launch_bounds__(kThreads) interleave_kernel(Upsampled s, Grid g, const T *phases, const float *bias, T *out, float2 *parts) {
  const int image = blockIdx.x / g.chunks, chunk = blockIdx.x % g.chunks;
  const int lane = threadIdx.x % g.lanes, walker = threadIdx.x / g.lanes, walkers = kThreads / g.lanes;
  const int first_channel = blockIdx.y * g.lanes * N, channel = first_channel + lane * N;
  const int width = 2 * s.width, total = 2 * s.height * width, count = pixels_of(chunk, g.chunk, total);
  const bool active = channel < s.channels;
  const int mine = active && walker < count ? (count - walker + walkers - 1) / walkers : 0;
  phases += (long long)image * (s.height + 1) * (s.width + 1) * 4 * s.channels + channel;
  out += (long long)image * total * s.channels + channel;
  float shift[N], around[N] = {}, first[N] = {}, second[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) shift[i] = bias && active ? bias[channel + i] : 0.0f;
#pragma unroll 4
  for (int k = 0; k < mine; ++k) {
    const int pixel = chunk * g.chunk + k * walkers + walker, y = pixel / width, x = pixel - y * width;
    const long long cell = (long long)((y + 1) / 2) * (s.width + 1) + (x + 1) / 2;
    const auto from = load_pack<T, N>(phases + (cell * 4 + (y & 1) * 2 + (x & 1)) * s.channels);
    Pack<T, N> to;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to.at[i] = from_float<T>(to_float(from.at[i]) + shift[i]);
      if (!kStats) continue;
      const float value = to_float(to.at[i]);
      if (k == 0) around[i] = value;
      const float off = value - around[i];
      first[i] += off;
      second[i] += off * off;
    }
    store_pack(out + (long long)pixel * s.channels, to);
  }
  if (!kStats) return;

  __shared__ float2 found[kThreads * N];  // walkers x channels of the slab: mean, squares
  const int channels = g.lanes * N;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float mean = mine ? first[i] / mine : 0.0f;
    found[walker * channels + lane * N + i] = make_float2(around[i] + mean, second[i] - first[i] * mean);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < channels && first_channel + c < s.channels; c += kThreads) {
    Moments sum{0, 0, 0};
    for (int w = 0; w < walkers && w < count; ++w) {
      const float2 part = found[w * channels + c];
      sum = combined(sum, {float((count - w + walkers - 1) / walkers), part.x, part.y});
    }
    parts[(long long)blockIdx.x * s.channels + first_channel + c] = make_float2(sum.mean, sum.squares);
  }
}

// A block is a group of an image.
__global__ void __launch_bounds__(kThreads) stats_kernel(Upsampled s, Grid g, const float2 *parts, int groups, float2 *stats) {
  const int size = s.channels / groups, group = blockIdx.x % groups, total = 4 * s.height * s.width;
  parts += (long long)(blockIdx.x / groups) * g.chunks * s.channels + group * size;
  Moments sum{0, 0, 0};
  for (long long i = threadIdx.x; i < (long long)g.chunks * size; i += kThreads) {
    const int chunk = int(i / size), channel = int(i % size);
    const float2 part = parts[(long long)chunk * s.channels + channel];
    sum = combined(sum, {float(pixels_of(chunk, g.chunk, total)), part.x, part.y});
  }
  __shared__ Moments sums[kThreads];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] = combined(sums[threadIdx.x], sums[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) {
    const float squares = sums[0].squares;  // rounding may leave it below zero; a NaN stays
    stats[blockIdx.x] = make_float2(sums[0].mean, (squares < 0 ? 0.0f : squares) / sums[0].count);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) split_kernel(Upsampled s, Grid g, const T *grad_out, T *grad_phases, float *parts) {
  const int image = blockIdx.x / g.chunks, chunk = blockIdx.x % g.chunks;
  const int lane = threadIdx.x % g.lanes, walker = threadIdx.x / g.lanes, walkers = kThreads / g.lanes;
  const int first_channel = blockIdx.y * g.lanes * N, channel = first_channel + lane * N;
  const int total = 4 * (s.height + 1) * (s.width + 1), count = pixels_of(chunk, g.chunk, total);
  const int mine = channel < s.channels && walker < count ? (count - walker + walkers - 1) / walkers : 0;
  grad_out += (long long)image * 4 * s.height * s.width * s.channels + channel;
  grad_phases += (long long)image * total * s.channels + channel;
  float sum[N] = {};
#pragma unroll 4
  for (int k = 0; k < mine; ++k) {
    const int place = chunk * g.chunk + k * walkers + walker, cell = place / 4, row = cell / (s.width + 1);
    const int y = 2 * row - (place >> 1 & 1), x = 2 * (cell - row * (s.width + 1)) - (place & 1);
    Pack<T, N> value;
    if (y >= 0 && y < 2 * s.height && x >= 0 && x < 2 * s.width) {
      value = load_pack<T, N>(grad_out + ((long long)y * 2 * s.width + x) * s.channels);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) value.at[i] = from_float<T>(0.0f);
    }
    store_pack(grad_phases + (long long)place * s.channels, value);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += to_float(value.at[i]);
  }

  __shared__ float found[kThreads * N];  // walkers x channels of the slab
  const int channels = g.lanes * N;
#pragma unroll
  for (int i = 0; i < N; ++i) found[walker * channels + lane * N + i] = sum[i];
  __syncthreads();
  for (int c = threadIdx.x; c < channels && first_channel + c < s.channels; c += kThreads) {
    float all = 0;
    for (int w = 0; w < walkers; ++w) all += found[w * channels + c];
    parts[(long long)blockIdx.x * s.channels + first_channel + c] = all;
  }
}

template <typename T, int N>
void interleave(const Launch &launch, const Upsampled &s, const Grid &g, const void *phases, const float *bias, void *out, int groups,
                float2 *stats, float2 *parts) {
  const dim3 blocks = blocks_of(s, g);
  const cudaStream_t stream = stream_of(launch);
  const T *from = static_cast<const T *>(phases);
  T *to = static_cast<T *>(out);
  if (groups)
    interleave_kernel<T, N, true><<<blocks, kThreads, 0, stream>>>(s, g, from, bias, to, parts);
  else
    interleave_kernel<T, N, false><<<blocks, kThreads, 0, stream>>>(s, g, from, bias, to, parts);
  check_launch("upsample_conv2x interleave_kernel");
  if (!groups) return;
  stats_kernel<<<s.images * groups, kThreads, 0, stream>>>(s, g, parts, groups, stats);
  check_launch("upsample_conv2x stats_kernel");
}

template <typename T, int N>
void split(const Launch &launch, const Upsampled &s, const Grid &g, const void *grad_out, void *grad_phases, float *parts) {
  split_kernel<T, N><<<blocks_of(s, g), kThreads, 0, stream_of(launch)>>>(s, g, static_cast<const T *>(grad_out),
                                                                          static_cast<T *>(grad_phases), parts);
  check_launch("upsample_conv2x split_kernel");
}

}  // namespace

int upsample_conv2x_chunks_cuda(const Upsampled &size, Dtype dtype) { return grid_of(size, dtype == Dtype::float32 ? 4 : 8).chunks; }

void upsample_conv2x_interleave_cuda(const Launch &launch, const Upsampled &size, const void *phases, const float *bias, void *out,
                                     int groups, float *stats, float *scratch, Dtype dtype) {
  const DeviceGuard guard(launch);
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Grid g = grid_of(size, kPack<T>);
    const auto run = g.pack == 1 ? interleave<T, 1> : interleave<T, kPack<T>>;
    run(launch, size, g, phases, bias, out, groups, reinterpret_cast<float2 *>(stats), reinterpret_cast<float2 *>(scratch));
  });
}

void upsample_conv2x_split_cuda(const Launch &launch, const Upsampled &size, const void *grad_out, void *grad_phases, float *scratch,
                                Dtype dtype) {
  const DeviceGuard guard(launch);
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Grid g = grid_of(size, kPack<T>);
    const auto run = g.pack == 1 ? split<T, 1> : split<T, kPack<T>>;
    run(launch, size, g, grad_out, grad_phases, scratch);
  });
}

}  // namespace stellar_fast
