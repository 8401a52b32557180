#include "common/fingerprint.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/simd.h"
#include "common/vec.h"

namespace stellar_fast {
namespace {

constexpr size_t kWords = 8, kVectors = 8;  // as many chains as hide a multiplication's latency
constexpr size_t kLanes = kWords * kVectors, kStripe = kLanes * sizeof(uint64_t);
constexpr size_t kPiece = 256 << 10;           // of a thread
constexpr size_t kAhead = 4 << 10;             // of what is read: a third faster from memory
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;  // 2^64 over the golden ratio

// For each state a permutation of the words, and for each word one of the states. A flipped sign or exponent is the top of a word, which
// a product alone would keep there: it comes down first.
template <typename Words>
STELLAR_FAST_INLINE Words step(Words state, Words words) {
  state ^= words;
  state ^= state >> 32;
  return state * kOdd;
}

STELLAR_FAST_SIMD_CLONES void add_stripes(uint64_t *state, const unsigned char *block, size_t count) {
  typedef uint64_t Words __attribute__((vector_size(kWords * sizeof(uint64_t))));
  Words kept[kVectors], words;
  std::memcpy(kept, state, sizeof kept);
  for (; count; --count)
#pragma GCC unroll 8
    for (size_t i = 0; i < kVectors; ++i, block += sizeof words) {
      __builtin_prefetch(block + kAhead);
      std::memcpy(&words, block, sizeof words);
      kept[i] = step(kept[i], words);
    }
  std::memcpy(state, kept, sizeof kept);
}

uint64_t of_piece(const unsigned char *block, size_t bytes) {
  uint64_t state[kLanes], whole = bytes;
  for (size_t i = 0; i < kLanes; ++i) state[i] = step<uint64_t>(i, bytes);
  add_stripes(state, block, bytes / kStripe);
  if (const size_t rest = bytes % kStripe) {
    unsigned char last[kStripe] = {};
    std::memcpy(last, block + bytes - rest, rest);
    add_stripes(state, last, 1);
  }
  for (const uint64_t lane : state) whole = step(whole, lane);
  return whole;
}

}  // namespace

uint64_t fingerprint(const void *block, size_t bytes, int threads) {
  const long long pieces = (long long)((bytes + kPiece - 1) / kPiece);
  std::vector<uint64_t> found(pieces);
#pragma omp parallel for num_threads(threads) schedule(static) if (pieces > 4)
  for (long long i = 0; i < pieces; ++i)
    found[i] = of_piece((const unsigned char *)block + i * kPiece, std::min(kPiece, bytes - size_t(i) * kPiece));
  uint64_t whole = bytes;
  for (const uint64_t piece : found) whole = step(whole, piece);
  return whole;
}

}  // namespace stellar_fast
