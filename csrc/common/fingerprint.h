#pragma once

#include <cstddef>
#include <cstdint>

namespace stellar_fast {

// 64 bits of a block of memory, in which every byte and its place count: a change of one word always changes them, any other with a
// probability of 1 - 2^-64. The same for any number of threads.
uint64_t fingerprint(const void *block, size_t bytes, int threads);

}  // namespace stellar_fast
