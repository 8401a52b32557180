// A product of fp32 multiply-adds whose tiles end in an argmin: the distances never leave the registers. cuBLAS would need a matrix for
// them, and would round its operands to TF32 where the process allows that, which the nearest code of a row does not survive.
#include "nearest_code/nearest_code.h"

#include "common/cuda.cuh"

namespace stellar_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kRows = 64, kCodes = 128, kDepth = 16;  // of a tile; kDepth elements of its vectors are in shared memory at a time
constexpr int kThreadRows = 4, kThreadCodes = 8;      // of a thread; its codes are two groups of four, half a tile apart
constexpr int kAcross = kCodes / kThreadCodes;        // threads that share a row: half a warp
constexpr int kPadded = 4;                            // floats behind a row in shared memory, against bank conflicts
static_assert(kThreads == kAcross * (kRows / kThreadRows), "every thread has its place in a tile");
static_assert(4 * kThreads == kRows * kDepth && kCodes == 2 * kRows, "a thread copies four elements of a row and of two entries");

// Better: smaller, or as small and of a lower index.
__device__ inline bool is_better(float value, int index, float than, int than_index) {
  return value < than || (value == than && index < than_index);
}

// squares[i] = |entry i|^2, a warp each, in the same order for every entry.
__global__ void __launch_bounds__(kThreads) squares_kernel(const float *codebook, int64_t stride, int codes, int width, float *squares) {
  const int code = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (code >= codes) return;  // the whole warp
  const float *entry = codebook + code * stride;
  float sum = 0;
  for (int k = lane; k < width; k += kWarp) sum += entry[k] * entry[k];
  for (int step = kWarp / 2; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (lane == 0) squares[code] = sum;
}

// Elements [k, k + 4) of a vector, zeros beyond its width and of none.
template <bool kVector, typename T>
__device__ inline void read_four(const T *vector, int k, int width, float (&out)[4]) {
  if constexpr (kVector) {  // the width is a multiple of 4
    Pack<T, 4> pack{};
    if (vector != nullptr && k < width) pack = load_pack<T, 4>(vector + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(pack.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = vector != nullptr && k + i < width ? to_float(vector[k + i]) : 0.0f;
  }
}

// A block finds the best of its rows among the codes of its split. Thread t has the rows from kThreadRows * (t / kAcross) on, and the codes
// 4 * (t % kAcross) + {0, 1, 2, 3} of each half of a tile: its indices rise, so that a strict comparison keeps the lowest of equals.
template <bool kVector, typename T>
__global__ void __launch_bounds__(kThreads) best_of_split_kernel(const T *z, int64_t z_stride, int64_t rows, const float *codebook,
                                                                 int64_t codebook_stride, int codes, int width, int tiles_of_split,
                                                                 const float *squares, float *best, int32_t *index) {
  __shared__ alignas(16) float z_part[kDepth][kRows + kPadded];
  __shared__ alignas(16) float code_part[kDepth][kCodes + kPadded];
  const int64_t first_row = int64_t(blockIdx.x) * kRows;
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  // what a thread copies: four elements of one row, and of two entries
  const int copy_row = threadIdx.x / 4, copy_k = threadIdx.x % 4 * 4;
  const T *copy_z = first_row + copy_row < rows ? z + (first_row + copy_row) * z_stride : nullptr;

  float smallest[kThreadRows];
  int smallest_index[kThreadRows];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    smallest[r] = INFINITY;
    smallest_index[r] = 0;
  }
  const int tiles = (codes + kCodes - 1) / kCodes;
  const int first_tile = blockIdx.y * tiles_of_split, last_tile = min(first_tile + tiles_of_split, tiles);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const int first_code = tile * kCodes;
    float sums[kThreadRows][kThreadCodes] = {};
    for (int start = 0; start < width; start += kDepth) {
      float four[4];
      read_four<kVector>(copy_z, start + copy_k, width, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) z_part[copy_k + i][copy_row] = four[i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int code = first_code + half * kRows + copy_row;
        read_four<kVector>(code < codes ? codebook + code * codebook_stride : nullptr, start + copy_k, width, four);
#pragma unroll
        for (int i = 0; i < 4; ++i) code_part[copy_k + i][half * kRows + copy_row] = four[i];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const auto left = load_pack<float, 4>(&z_part[k][down * kThreadRows]);
        const auto low = load_pack<float, 4>(&code_part[k][across * 4]);
        const auto high = load_pack<float, 4>(&code_part[k][kCodes / 2 + across * 4]);
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[r][i] += left.at[r] * low.at[i];
            sums[r][4 + i] += left.at[r] * high.at[i];
          }
      }
      __syncthreads();  // before the next elements overwrite these
    }
#pragma unroll
    for (int i = 0; i < kThreadCodes; ++i) {
      const int code = first_code + i / 4 * (kCodes / 2) + across * 4 + i % 4;
      if (code >= codes) continue;
      const float square = squares[code];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        float distance = square - 2 * sums[r][i];
        if (distance != distance) distance = -INFINITY;
        if (distance < smallest[r]) {
          smallest[r] = distance;
          smallest_index[r] = code;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    float value = smallest[r];
    int at = smallest_index[r];
#pragma unroll
    for (int step = kAcross / 2; step; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffff, value, step);
      const int other_at = __shfl_xor_sync(0xffffffff, at, step);
      if (is_better(other, other_at, value, at)) {
        value = other;
        at = other_at;
      }
    }
    const int64_t row = first_row + down * kThreadRows + r;
    if (across == 0 && row < rows) {
      best[blockIdx.y * rows + row] = value;
      index[blockIdx.y * rows + row] = at;
    }
  }
}

// The best of the splits of each row, whose codes rise: again a strict comparison keeps the lowest.
__global__ void __launch_bounds__(kThreads) best_kernel(const float *best, const int32_t *index, int splits, int64_t rows, int64_t *out) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  float value = best[row];
  int32_t at = index[row];
  for (int split = 1; split < splits; ++split) {
    const float other = best[split * rows + row];
    if (other < value) {
      value = other;
      at = index[split * rows + row];
    }
  }
  out[row] = at;
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Whether four elements of a row may be read at once.
bool reads_four(const void *data, int64_t stride, int width, size_t size) {
  return width % 4 == 0 && stride % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * size) == 0;
}

}  // namespace

void nearest_code_cuda(const Launch &launch, const NearestCode &c, const NearestCodeScratch &s, Dtype dtype) {
  if (c.rows == 0) return;
  const DeviceGuard guard(launch);
  const cudaStream_t stream = stream_of(launch);
  squares_kernel<<<unsigned(divide_up(c.codes, kThreads / kWarp)), kThreads, 0, stream>>>(c.codebook, c.codebook_stride, c.codes, c.width,
                                                                                        s.squares);
  check_launch("nearest_code squares_kernel");
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(unsigned(divide_up(c.rows, kRows)), s.splits);
    const int tiles_of_split = int(divide_up(divide_up(c.codes, kCodes), s.splits));
    const bool vector =
        reads_four(c.z, c.z_stride, c.width, sizeof(T)) && reads_four(c.codebook, c.codebook_stride, c.width, sizeof(float));
    const auto kernel = vector ? best_of_split_kernel<true, T> : best_of_split_kernel<false, T>;
    kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T *>(c.z), c.z_stride, c.rows, c.codebook, c.codebook_stride, c.codes, c.width,
                                          tiles_of_split, s.squares, s.best, s.index);
    check_launch("nearest_code best_of_split_kernel");
  });
  best_kernel<<<unsigned(divide_up(c.rows, kThreads)), kThreads, 0, stream>>>(s.best, s.index, s.splits, c.rows, c.out);
  check_launch("nearest_code best_kernel");
}

}  // namespace stellar_fast
