#pragma once

namespace stellar_fast {

// Keeps freed memory inside the process (glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD raised to their largest values).
// Returns nullptr when it took effect, otherwise the reason why not.
const char *raise_allocator_thresholds();

}  // namespace stellar_fast
