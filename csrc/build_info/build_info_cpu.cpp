#include "build_info/build_info.h"

#include "common/simd.h"

#ifdef _OPENMP
#include <dlfcn.h>
#include <omp.h>
#endif

namespace stellar_fast {
namespace {

// Chosen by the same resolver as the clones, so that the answer is what really runs.
#if STELLAR_FAST_HAS_SIMD_CLONES
__attribute__((target("arch=x86-64-v4"))) const char *simd_level() { return "x86-64-v4"; }
__attribute__((target("arch=x86-64-v3"))) const char *simd_level() { return "x86-64-v3"; }
__attribute__((target("default"))) const char *simd_level() { return "x86-64 baseline"; }
#else
const char *simd_level() { return "compiler default"; }
#endif

}  // namespace

CpuInfo cpu_info() {
  CpuInfo info{STELLAR_FAST_COMPILER, STELLAR_FAST_FLAGS, simd_level(), 0, ""};
#ifdef _OPENMP
  info.openmp_version = _OPENMP;
  Dl_info symbol;
  if (dladdr(reinterpret_cast<void *>(&omp_get_max_threads), &symbol)) info.openmp_library = symbol.dli_fname;
#endif
  return info;
}

const char *source_hashes() { return STELLAR_FAST_SOURCE_HASHES; }

}  // namespace stellar_fast
