#pragma once

#include <string>

namespace stellar_fast {

struct CpuInfo {
  std::string compiler;
  std::string flags;
  std::string simd_level;      // what the run-time choice of simd.h takes on this processor
  int openmp_version;          // the _OPENMP macro (yyyymm), 0 without OpenMP
  std::string openmp_library;  // the file whose OpenMP runtime this module calls, empty without OpenMP
};
CpuInfo cpu_info();

// "op=hash " of each op's sources, as they were built.
const char *source_hashes();

#ifdef STELLAR_FAST_CUDA
struct CudaInfo {
  int runtime_version;        // 13000 for 13.0; linked statically
  std::string architectures;  // compute capabilities compiled for, "800,900,1000"
  int device_count;           // 0 on a machine without a GPU or driver
  std::string device_error;   // why device_count is 0, empty otherwise
};
CudaInfo cuda_info();
#endif

}  // namespace stellar_fast
