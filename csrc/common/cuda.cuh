// For every *_cuda.cu: elements in and out of fp32, accesses of up to 16 bytes, errors of launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "common/launch.h"

namespace stellar_fast {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}

// N elements that one instruction reads or writes; addresses must be multiples of its size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <typename T, int N>
__device__ inline Pack<T, N> load_pack(const T *p) {
  return *reinterpret_cast<const Pack<T, N> *>(p);
}

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// One store: what a plain assignment copies unchanged from a load is stored element by element (nvcc 13.0).
template <typename T, int N>
__device__ inline void store_pack(T *p, const Pack<T, N> &pack) {
  typename Word<sizeof(pack)>::Type word;
  memcpy(&word, &pack, sizeof word);
  __stwb(reinterpret_cast<decltype(word) *>(p), word);
}

inline void check_cuda(cudaError_t error, const char *what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// After every launch: a configuration that the device refuses raises here and not in a later, unrelated call.
inline void check_launch(const char *kernel) { check_cuda(cudaGetLastError(), kernel); }

// Launches on the tensors' device in its scope, and restores the caller's.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Launch &launch) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    check_cuda(cudaSetDevice(launch.device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard &) = delete;

 private:
  int before_ = 0;
};

inline cudaStream_t stream_of(const Launch &launch) { return reinterpret_cast<cudaStream_t>(launch.stream); }

// Calls f with a value of the element type: by_dtype(dtype, [&](auto element) { using T = decltype(element); ... });
template <typename F>
void by_dtype(Dtype dtype, const F &f) {
  if (dtype == Dtype::float32) return f(float{});
  if (dtype == Dtype::bfloat16) return f(__nv_bfloat16{});
  return f(__half{});
}

}  // namespace stellar_fast
