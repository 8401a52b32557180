// A block takes a chunk of an image's pixels and a tile of its channels: threadIdx.x is a pack of neighbouring channels, whose factors and
// sums a thread keeps in registers while it goes down the rows threadIdx.y, threadIdx.y + blockDim.y, ... Sums are finished by kernels of
// their own in a fixed order, not by atomics: results are the same every time.
#include "group_norm_silu/group_norm_silu.h"

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/cuda.cuh"

namespace stellar_fast {
namespace {

constexpr int kThreads = 256;
constexpr ptrdiff_t kChunkElements = 8192;  // 32 a thread: an image of 128 x 256 x 256 has threads for all of an H100
constexpr ptrdiff_t kMostChunks = 4096;  // of all images: what they write for the finishing kernels stays small beside the images
constexpr int kPartSide = 32;

struct Sizes {
  ptrdiff_t images, pixels, chunks, chunk_rows;  // chunks of an image, and pixels in one
  int channels, groups, width;                   // `width`: channels of a group
};

Sizes sizes_of(const GroupNorm &norm) {
  const ptrdiff_t wanted = norm.pixels * norm.channels / kChunkElements, most = kMostChunks / std::max<ptrdiff_t>(norm.images, 1);
  const ptrdiff_t parts = std::max<ptrdiff_t>(1, std::min(wanted, most)), rows = std::max<ptrdiff_t>(1, (norm.pixels + parts - 1) / parts);
  return {norm.images, norm.pixels, std::max<ptrdiff_t>(1, (norm.pixels + rows - 1) / rows), rows, norm.channels, norm.groups,
          norm.channels / norm.groups};
}

struct Grid {
  dim3 blocks, threads;
};

// For packs of `lanes` channels.
Grid grid_of(const Sizes &s, int lanes) {
  const int packs = s.channels / lanes, columns = std::min(packs, kThreads);
  return {dim3(unsigned(s.images * s.chunks), unsigned((packs + columns - 1) / columns)), dim3(columns, kThreads / columns)};
}

// What the calling thread works on.
struct Part {
  ptrdiff_t image, offset;  // `offset`: element of the thread's channels in the image's first row
  ptrdiff_t first, last;    // rows
  int channel;
  bool active;
};

template <int N>
__device__ inline Part part_of(const Sizes &s) {
  Part part;
  part.image = blockIdx.x / s.chunks;
  part.first = blockIdx.x % s.chunks * s.chunk_rows;
  part.last = part.first + s.chunk_rows < s.pixels ? part.first + s.chunk_rows : s.pixels;
  part.channel = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  part.active = part.channel < s.channels;
  part.offset = part.image * s.pixels * s.channels + part.channel;
  return part;
}

// parts[image][chunk][channel] = mean, and sum of squared differences from it. A thread takes its sums less its first value: a mean much
// larger than the deviation then costs no digits.
template <typename T, int N, bool kAdds>
__global__ void __launch_bounds__(kThreads, 3) sums_kernel(Sizes s, const T *__restrict__ x, const T *__restrict__ residual, T *__restrict__ y,
                                                        float2 *__restrict__ parts) {
  __shared__ float2 shared[kThreads * N];
  const Part part = part_of<N>(s);
  float origin[N] = {}, sums[N] = {}, squares[N] = {};
  ptrdiff_t count = 0;
  if (part.active) {
#pragma unroll 2
    for (ptrdiff_t row = part.first + threadIdx.y; row < part.last; row += blockDim.y, ++count) {
      const ptrdiff_t at = part.offset + row * s.channels;
      Pack<T, N> values = load_pack<T, N>(x + at);
      if constexpr (kAdds) {
        const Pack<T, N> added = load_pack<T, N>(residual + at);
#pragma unroll
        for (int i = 0; i < N; ++i) values.at[i] = from_float<T>(to_float(values.at[i]) + to_float(added.at[i]));
        store_pack(y + at, values);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float value = to_float(values.at[i]);
        origin[i] = count ? origin[i] : value;
        const float off = value - origin[i];
        sums[i] += off;
        squares[i] += off * off;
      }
    }
  }
  const int columns = blockDim.x * N;
  const float scale = count ? 1.0f / count : 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float mean = sums[i] * scale;
    shared[threadIdx.y * columns + threadIdx.x * N + i] = make_float2(origin[i] + mean, squares[i] - sums[i] * mean);
  }
  __syncthreads();
  const ptrdiff_t rows = part.last - part.first;
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < columns; c += blockDim.x * blockDim.y) {
    const int channel = blockIdx.y * columns + c;
    if (channel >= s.channels) break;
    double sum = 0, square = 0;
    for (int row = 0; row < blockDim.y && row < rows; ++row) {
      const double of_row = double((rows - row + blockDim.y - 1) / blockDim.y), mean = shared[row * columns + c].x;
      sum += of_row * mean;
      square += shared[row * columns + c].y + of_row * mean * mean;
    }
    const double mean = sum / rows;
    parts[ptrdiff_t(blockIdx.x) * s.channels + channel] = make_float2(float(mean), float(square - sum * mean));
  }
}

// The sum of both over a block's threads, in the first of them.
__device__ inline double2 block_sum(double2 value) {
  __shared__ double2 shared[kThreads];
  shared[threadIdx.x] = value;
  for (int half = kThreads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      shared[threadIdx.x].x += shared[threadIdx.x + half].x;
      shared[threadIdx.x].y += shared[threadIdx.x + half].y;
    }
  }
  return shared[0];
}

// A block an image and group.
__global__ void __launch_bounds__(kThreads) statistics_kernel(Sizes s, const float2 *__restrict__ parts, float2 *__restrict__ stats) {
  const ptrdiff_t image = blockIdx.x / s.groups;
  const int first = blockIdx.x % s.groups * s.width;
  double2 sums = make_double2(0, 0);
  for (ptrdiff_t i = threadIdx.x; i < s.chunks * s.width; i += kThreads) {
    const ptrdiff_t chunk = i / s.width, begin = chunk * s.chunk_rows;
    const double rows = double(begin + s.chunk_rows < s.pixels ? s.chunk_rows : s.pixels - begin);
    const float2 part = parts[(image * s.chunks + chunk) * s.channels + first + i % s.width];
    sums.x += rows * part.x;
    sums.y += part.y + rows * part.x * part.x;
  }
  sums = block_sum(sums);
  if (threadIdx.x) return;
  const double count = double(s.pixels) * s.width, mean = sums.x / count, variance = sums.y / count - mean * mean;
  stats[blockIdx.x] = make_float2(float(mean), float(variance < 0 ? 0 : variance));
}

// What both directions know of a thread's channels.
template <int N>
struct Factors {
  float mean[N], rstd[N], weight[N], bias[N];

  __device__ Factors(const Sizes &s, const Part &part, const float2 *stats, const float *weights, const float *biases, float eps) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float2 of_group = stats[part.image * s.groups + (part.channel + i) / s.width];
      mean[i] = of_group.x;
      rstd[i] = isfinite(of_group.y) ? 1 / sqrtf(of_group.y + eps) : NAN;  // squares that overflow are no statistics
      weight[i] = weights[part.channel + i];
      bias[i] = biases[part.channel + i];
    }
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) apply_kernel(Sizes s, const T *__restrict__ x, const float2 *__restrict__ stats,
                                                         const float *__restrict__ weight, const float *__restrict__ bias, float eps,
                                                         T *__restrict__ out) {
  const Part part = part_of<N>(s);
  if (!part.active) return;
  const Factors<N> factors(s, part, stats, weight, bias, eps);
#pragma unroll 4
  for (ptrdiff_t row = part.first + threadIdx.y; row < part.last; row += blockDim.y) {
    const ptrdiff_t at = part.offset + row * s.channels;
    Pack<T, N> values = load_pack<T, N>(x + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float z = (to_float(values.at[i]) - factors.mean[i]) * factors.rstd[i] * factors.weight[i] + factors.bias[i];
      values.at[i] = from_float<T>(__fdividef(z, 1 + expf(-z)));  // 0 also where the exponential overflows
    }
    store_pack(out + at, values);
  }
}

// The normalised value, and the gradient of what follows it: weight, bias and SiLU.
template <int N>
__device__ inline float2 unit_and_grad(const Factors<N> &factors, int i, float x, float grad_out) {
  const float unit = (x - factors.mean[i]) * factors.rstd[i], z = unit * factors.weight[i] + factors.bias[i];
  const float gate = __fdividef(1.0f, 1 + expf(-z));
  return make_float2(unit, grad_out * (gate + gate * z * (1 - gate)));
}

// parts[image][chunk][channel] = the gradients of weight and bias.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) grad_sums_kernel(Sizes s, const T *__restrict__ x, const T *__restrict__ grad_out,
                                                             const float2 *__restrict__ stats, const float *__restrict__ weight,
                                                             const float *__restrict__ bias, float eps, float2 *__restrict__ parts) {
  __shared__ float2 shared[kThreads * N];
  const Part part = part_of<N>(s);
  float along[N] = {}, added[N] = {};
  if (part.active) {
    const Factors<N> factors(s, part, stats, weight, bias, eps);
#pragma unroll 2
    for (ptrdiff_t row = part.first + threadIdx.y; row < part.last; row += blockDim.y) {
      const ptrdiff_t at = part.offset + row * s.channels;
      const Pack<T, N> values = load_pack<T, N>(x + at), grads = load_pack<T, N>(grad_out + at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float2 pair = unit_and_grad<N>(factors, i, to_float(values.at[i]), to_float(grads.at[i]));
        along[i] += pair.x * pair.y;
        added[i] += pair.y;
      }
    }
  }
  const int columns = blockDim.x * N;
#pragma unroll
  for (int i = 0; i < N; ++i) shared[threadIdx.y * columns + threadIdx.x * N + i] = make_float2(along[i], added[i]);
  __syncthreads();
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < columns; c += blockDim.x * blockDim.y) {
    const int channel = blockIdx.y * columns + c;
    if (channel >= s.channels) break;
    float2 sum = make_float2(0, 0);
    for (int row = 0; row < blockDim.y; ++row) {
      sum.x += shared[row * columns + c].x;
      sum.y += shared[row * columns + c].y;
    }
    parts[ptrdiff_t(blockIdx.x) * s.channels + channel] = sum;
  }
}

// sums[image][channel] = the sum of its chunks' parts. A block takes kPartSide channels of an image.
__global__ void __launch_bounds__(kPartSide *kPartSide) channel_sums_kernel(Sizes s, const float2 *__restrict__ parts,
                                                                            float2 *__restrict__ sums) {
  __shared__ double2 shared[kPartSide][kPartSide];
  const int tiles = (s.channels + kPartSide - 1) / kPartSide, channel = blockIdx.x % tiles * kPartSide + threadIdx.x;
  const ptrdiff_t image = blockIdx.x / tiles;
  double2 sum = make_double2(0, 0);
  if (channel < s.channels) {
    for (ptrdiff_t chunk = threadIdx.y; chunk < s.chunks; chunk += kPartSide) {
      const float2 part = parts[(image * s.chunks + chunk) * s.channels + channel];
      sum.x += part.x;
      sum.y += part.y;
    }
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || channel >= s.channels) return;
  for (int i = 1; i < kPartSide; ++i) {
    sum.x += shared[i][threadIdx.x].x;
    sum.y += shared[i][threadIdx.x].y;
  }
  sums[image * s.channels + channel] = make_float2(float(sum.x), float(sum.y));
}

// means[image][group] = over a group, of the gradient of the normalised value (y) and of its product with that value (x). A block each.
__global__ void __launch_bounds__(kThreads) group_means_kernel(Sizes s, const float2 *__restrict__ sums, const float *__restrict__ weight,
                                                               float2 *__restrict__ means) {
  const ptrdiff_t image = blockIdx.x / s.groups;
  const int first = blockIdx.x % s.groups * s.width;
  double2 sum = make_double2(0, 0);
  for (int c = first + threadIdx.x; c < first + s.width; c += kThreads) {
    const float2 of_channel = sums[image * s.channels + c];
    sum.x += double(weight[c]) * of_channel.x;
    sum.y += double(weight[c]) * of_channel.y;
  }
  sum = block_sum(sum);
  const double count = double(s.pixels) * s.width;
  if (threadIdx.x == 0) means[blockIdx.x] = make_float2(float(sum.x / count), float(sum.y / count));
}

// A thread a channel.
__global__ void __launch_bounds__(kThreads) parameters_kernel(Sizes s, const float2 *__restrict__ sums, float *__restrict__ grad_weight,
                                                              float *__restrict__ grad_bias) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= s.channels) return;
  double2 sum = make_double2(0, 0);
  for (ptrdiff_t image = 0; image < s.images; ++image) {
    const float2 of_image = sums[image * s.channels + channel];
    sum.x += of_image.x;
    sum.y += of_image.y;
  }
  grad_weight[channel] = float(sum.x);
  grad_bias[channel] = float(sum.y);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) grad_x_kernel(Sizes s, const T *__restrict__ x, const T *__restrict__ grad_out,
                                                          const T *__restrict__ grad_y, const float2 *__restrict__ stats,
                                                          const float2 *__restrict__ means, const float *__restrict__ weight,
                                                          const float *__restrict__ bias, float eps, T *__restrict__ grad_x) {
  const Part part = part_of<N>(s);
  if (!part.active) return;
  const Factors<N> factors(s, part, stats, weight, bias, eps);
  float slope[N], shift[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float2 of_group = means[part.image * s.groups + (part.channel + i) / s.width];
    slope[i] = of_group.x;
    shift[i] = of_group.y;
  }
#pragma unroll 2
  for (ptrdiff_t row = part.first + threadIdx.y; row < part.last; row += blockDim.y) {
    const ptrdiff_t at = part.offset + row * s.channels;
    const Pack<T, N> values = load_pack<T, N>(x + at), grads = load_pack<T, N>(grad_out + at);
    Pack<T, N> through = {};
    if (grad_y) through = load_pack<T, N>(grad_y + at);
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float2 pair = unit_and_grad<N>(factors, i, to_float(values.at[i]), to_float(grads.at[i]));
      const float own = (pair.y * factors.weight[i] - shift[i] - pair.x * slope[i]) * factors.rstd[i];
      result.at[i] = from_float<T>(grad_y ? own + to_float(through.at[i]) : own);
    }
    store_pack(grad_x + at, result);
  }
}

// Calls f with an element and the number of them in an access: 16 bytes where the channels and all addresses allow it, else one element.
template <typename F>
void by_pack(Dtype dtype, int channels, std::initializer_list<const void *> addresses, const F &f) {
  by_dtype(dtype, [&](auto element) {
    constexpr int kLanes = 16 / sizeof element;
    bool wide = channels % kLanes == 0;
    for (const void *address : addresses) wide = wide && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    if (wide)
      f(element, std::integral_constant<int, kLanes>());
    else
      f(element, std::integral_constant<int, 1>());
  });
}

}  // namespace

size_t group_norm_silu_workspace_cuda(const GroupNorm &norm) {
  const Sizes s = sizes_of(norm);
  return 2 * s.images * ((s.chunks + 1) * s.channels + s.groups);  // of the backward, which needs more
}

void group_norm_silu_forward_cuda(const Launch &launch, const GroupNorm &norm, const void *x, const void *residual, void *y, float *stats,
                                  bool given, void *out, Dtype dtype, float *workspace) {
  const DeviceGuard guard(launch);
  const cudaStream_t stream = stream_of(launch);
  const Sizes s = sizes_of(norm);
  if (!s.images) return;
  float2 *const parts = reinterpret_cast<float2 *>(workspace), *const pairs = reinterpret_cast<float2 *>(stats);
  by_pack(dtype, norm.channels, {x, residual, residual ? y : nullptr, out}, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int N = decltype(lanes)::value;
    const Grid grid = grid_of(s, N);
    const T *from = static_cast<const T *>(x);
    if (residual) {
      sums_kernel<T, N, true><<<grid.blocks, grid.threads, 0, stream>>>(s, from, static_cast<const T *>(residual), static_cast<T *>(y), parts);
      from = static_cast<const T *>(y);
    } else if (!given) {
      sums_kernel<T, N, false><<<grid.blocks, grid.threads, 0, stream>>>(s, from, nullptr, nullptr, parts);
    }
    check_launch("group_norm_silu: sums_kernel");
    if (!given) {
      statistics_kernel<<<unsigned(s.images * s.groups), kThreads, 0, stream>>>(s, parts, pairs);
      check_launch("group_norm_silu: statistics_kernel");
    }
    apply_kernel<T, N><<<grid.blocks, grid.threads, 0, stream>>>(s, from, pairs, norm.weight, norm.bias, norm.eps, static_cast<T *>(out));
    check_launch("group_norm_silu: apply_kernel");
  });
}

void group_norm_silu_backward_cuda(const Launch &launch, const GroupNorm &norm, const float *stats, const void *grad_out,
                                   const void *grad_y, const void *x, void *grad_x, float *grad_weight, float *grad_bias, Dtype dtype,
                                   float *workspace) {
  const DeviceGuard guard(launch);
  const cudaStream_t stream = stream_of(launch);
  const Sizes s = sizes_of(norm);
  float2 *const parts = reinterpret_cast<float2 *>(workspace), *const sums = parts + s.images * s.chunks * s.channels;
  float2 *const means = sums + s.images * s.channels;
  const float2 *const pairs = reinterpret_cast<const float2 *>(stats);
  if (s.images) {
    by_pack(dtype, norm.channels, {x, grad_out, grad_y, grad_x}, [&](auto element, auto lanes) {
      using T = decltype(element);
      constexpr int N = decltype(lanes)::value;
      const Grid grid = grid_of(s, N);
      const T *values = static_cast<const T *>(x), *grads = static_cast<const T *>(grad_out);
      grad_sums_kernel<T, N><<<grid.blocks, grid.threads, 0, stream>>>(s, values, grads, pairs, norm.weight, norm.bias, norm.eps, parts);
      check_launch("group_norm_silu: grad_sums_kernel");
      const ptrdiff_t tiles = (s.channels + kPartSide - 1) / kPartSide;
      channel_sums_kernel<<<unsigned(s.images * tiles), dim3(kPartSide, kPartSide), 0, stream>>>(s, parts, sums);
      check_launch("group_norm_silu: channel_sums_kernel");
      group_means_kernel<<<unsigned(s.images * s.groups), kThreads, 0, stream>>>(s, sums, norm.weight, means);
      check_launch("group_norm_silu: group_means_kernel");
      grad_x_kernel<T, N><<<grid.blocks, grid.threads, 0, stream>>>(s, values, grads, static_cast<const T *>(grad_y), pairs, means,
                                                                  norm.weight, norm.bias, norm.eps, static_cast<T *>(grad_x));
      check_launch("group_norm_silu: grad_x_kernel");
    });
  }
  parameters_kernel<<<(s.channels + kThreads - 1) / kThreads, kThreads, 0, stream>>>(s, sums, grad_weight, grad_bias);
  check_launch("group_norm_silu: parameters_kernel");
}

}  // namespace stellar_fast
