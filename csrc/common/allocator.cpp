#include "common/allocator.h"

#include <climits>
#include <cstdlib>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace stellar_fast {

const char *raise_allocator_thresholds() {
#ifdef __GLIBC__
  // By default glibc maps every block over 32 MiB afresh and unmaps it when freed, so each use pays for its page faults again.
  // mallopt takes an int: blocks of 2 GiB and more are still mapped.
  if (!mallopt(M_MMAP_THRESHOLD, INT_MAX)) return "glibc refused M_MMAP_THRESHOLD";
  if (!mallopt(M_TRIM_THRESHOLD, INT_MAX)) return "glibc refused M_TRIM_THRESHOLD";
  return nullptr;
#else
  return "the C library is not glibc";
#endif
}

}  // namespace stellar_fast
