#include "common/allocator.h"

#include <climits>
#include <cstdint>
#include <cstdlib>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
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

void expect_first_write(void *block, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  constexpr size_t kLarge = 32 << 20;  // what glibc maps afresh whatever was freed before
  if (bytes < kLarge) return;
  const uintptr_t first = ((uintptr_t)block + kHuge - 1) & ~(kHuge - 1), last = ((uintptr_t)block + bytes) & ~(kHuge - 1);
  unsigned char in_use = 1;
  if (mincore((void *)((first + last) / 2 & ~(kHuge - 1)), 4096, &in_use) == 0 && !(in_use & 1))
    madvise((void *)first, last - first, MADV_HUGEPAGE);  // where it is refused the faults are as before
#else
  (void)block, (void)bytes;
#endif
}

}  // namespace stellar_fast
