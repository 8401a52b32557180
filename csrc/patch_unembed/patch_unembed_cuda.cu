// The products are cuBLAS's; here is what stands between them and images. A block takes a band, its threads along the rows of pixels in x
// and across them in y; each moves as many pixels at once as the patch's side and the addresses allow.
#include <algorithm>
#include <type_traits>

#include "common/cuda.cuh"
#include "patch_unembed/patch_unembed.h"

namespace stellar_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Where a block's band begins in the image, and its first patch among the patches.
struct Band {
  int channel;
  int64_t pixels, patches;

  __device__ explicit Band(const PatchGrid &g) {
    const int band = blockIdx.x, plane = band / g.rows, row = band % g.rows, image = plane / g.channels;
    channel = plane % g.channels;
    pixels = int64_t(band) * g.side * g.side * g.columns;
    patches = ((int64_t(image) * g.rows + row) * g.columns * g.channels + channel) * g.side * g.side;
  }
};

// Calls f(offset within the band's pixels, offset from its first patch) for every N pixels that are this thread's.
template <int N, typename F>
__device__ inline void for_each_pack(const PatchGrid &g, const F &f) {
  const int width = g.columns * g.side;
  const int64_t patch_stride = int64_t(g.channels) * g.side * g.side;
  for (int at = threadIdx.x * N; at < width; at += blockDim.x * N) {
    const int column = at / g.side;
    const int64_t patch = column * patch_stride + (at - column * g.side);
    for (int i = threadIdx.y; i < g.side; i += blockDim.y) f(i * width + at, patch + i * g.side);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) unpack_kernel(PatchGrid g, const T *patches, const T *bias, T *image) {
  using Pixels = Pack<T, N>;
  const Band band(g);
  const float add = bias ? to_float(bias[band.channel]) : 0.0f;
  const T *from = patches + band.patches;
  T *to = image + band.pixels;
  for_each_pack<N>(g, [&](int pixel, int64_t patch) {
    Pixels pixels = load_pack<T, N>(from + patch);
#pragma unroll
    for (T &x : pixels.at) x = from_float<T>(to_float(x) + add);
    store_pack(to + pixel, pixels);
  });
}

// The sum over the block, in its first thread; added in the same order every time.
__device__ inline float sum_of_block(float x) {
  __shared__ float warps[kThreads / kWarp];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, count = blockDim.x * blockDim.y / kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(~0u, x, step);
  if (thread % kWarp == 0) warps[thread / kWarp] = x;
  __syncthreads();
  float total = 0;
  if (thread == 0)
    for (int i = 0; i < count; ++i) total += warps[i];
  return total;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) pack_kernel(PatchGrid g, const T *image, T *patches, float *sums) {
  using Pixels = Pack<T, N>;
  const Band band(g);
  const T *from = image + band.pixels;
  T *to = patches + band.patches;
  float sum = 0;
  for_each_pack<N>(g, [&](int pixel, int64_t patch) {
    const Pixels pixels = load_pack<T, N>(from + pixel);
#pragma unroll
    for (const T &x : pixels.at) sum += to_float(x);
    store_pack(to + patch, pixels);
  });
  sum = sum_of_block(sum);
  if (threadIdx.x == 0 && threadIdx.y == 0) sums[blockIdx.x] = sum;
}

// The most pixels of one access: a power of two, of at most 16 bytes, that divides the side, so that no access leaves a patch's row, and
// whose size divides both addresses.
template <typename T>
int pack_size(int side, const void *a, const void *b) {
  const auto addresses = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  int n = 16 / sizeof(T);
  while (n > 1 && (side % n || addresses % (n * sizeof(T)))) n /= 2;
  return n;
}

// Calls f with a pack size as a constant.
template <typename T, typename F>
void by_pack_size(int n, const F &f) {
  if constexpr (sizeof(T) == 2)
    if (n == 8) return f(std::integral_constant<int, 8>{});
  if (n == 4) return f(std::integral_constant<int, 4>{});
  if (n == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

int blocks_of(const PatchGrid &g) { return g.images * g.channels * g.rows; }

dim3 threads_of(const PatchGrid &g, int n) {
  const int packs = (g.columns * g.side + n - 1) / n;
  const int x = std::min(kThreads, (packs + kWarp - 1) / kWarp * kWarp);  // whole warps, which the sum needs
  return dim3(x, kThreads / x);
}

}  // namespace

void patch_unembed_forward_cuda(const Launch &launch, const PatchGrid &grid, const void *patches, const void *bias, void *image,
                                Dtype dtype) {
  if (grid.images == 0) return;
  const DeviceGuard guard(launch);
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const int n = pack_size<T>(grid.side, patches, image);
    by_pack_size<T>(n, [&](auto size) {
      unpack_kernel<T, decltype(size)::value><<<blocks_of(grid), threads_of(grid, n), 0, stream_of(launch)>>>(
          grid, static_cast<const T *>(patches), static_cast<const T *>(bias), static_cast<T *>(image));
    });
  });
  check_launch("patch_unembed unpack_kernel");
}

void patch_unembed_backward_cuda(const Launch &launch, const PatchGrid &grid, const void *image, void *patches, float *sums, Dtype dtype) {
  if (grid.images == 0) return;
  const DeviceGuard guard(launch);
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const int n = pack_size<T>(grid.side, image, patches);
    by_pack_size<T>(n, [&](auto size) {
      pack_kernel<T, decltype(size)::value><<<blocks_of(grid), threads_of(grid, n), 0, stream_of(launch)>>>(
          grid, static_cast<const T *>(image), static_cast<T *>(patches), sums);
    });
  });
  check_launch("patch_unembed pack_kernel");
}

}  // namespace stellar_fast
