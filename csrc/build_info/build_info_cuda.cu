#include "build_info/build_info.h"

#include <cuda_runtime.h>

#define STRINGIFY_(...) #__VA_ARGS__
#define STRINGIFY(...) STRINGIFY_(__VA_ARGS__)

namespace stellar_fast {

CudaInfo cuda_info() {
  CudaInfo info{0, STRINGIFY(__CUDA_ARCH_LIST__), 0, ""};
  cudaRuntimeGetVersion(&info.runtime_version);
  const cudaError_t error = cudaGetDeviceCount(&info.device_count);
  if (error != cudaSuccess) {
    info.device_count = 0;
    info.device_error = cudaGetErrorString(error);
    cudaGetLastError();  // cleared: a later, unrelated call must not report it
  }
  return info;
}

}  // namespace stellar_fast
