#pragma once

#include <cstddef>

namespace stellar_fast {

// Keeps freed memory inside the process (glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD raised to their largest values).
// Returns nullptr when it took effect, otherwise the reason why not.
const char *raise_allocator_thresholds();

// Asks for huge pages beneath a large block that is about to be written for the first time: its page faults may cost more than what is
// computed. Does nothing to a block that was in use before.
void expect_first_write(void *block, size_t bytes);

}  // namespace stellar_fast
