// All pairs of two small sets of rows, such as the tokens of two views: their dot products or squared distances, and each one's best.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "common/vec.h"

namespace stellar_fast {

// Tokens of images, and of views within an image where there are several; strides in elements, a token's own elements are contiguous.
struct Tokens {
  const void *data;
  bool is_bfloat16;
  ptrdiff_t image_stride, view_stride, token_stride;
};

constexpr int kPairsPad = 16;  // floats of the widest vector, and a multiple of a tile of pairs

inline int pairs_padded(int n) { return (n + kPairsPad - 1) / kPairsPad * kPairsPad; }

// Floats with the alignment of the widest vector: a vector across two cache lines costs two accesses.
class AlignedFloats {
 public:
  explicit AlignedFloats(size_t count) : data_(static_cast<float *>(::operator new(count * sizeof(float), kAlign))) {}
  float *get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float *p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<float, Free> data_;
};

// The tokens of one view as floats, token k at packed + k * pairs_padded(width), zeros beyond the width.
template <int W, typename T>
STELLAR_FAST_INLINE void pack_tokens_of(const T *from, ptrdiff_t stride, int count, int width, float *packed) {
  const int padded = pairs_padded(width);
  for (int k = 0; k < count; ++k, from += stride, packed += padded) {
    int i = 0;
    for (; i + W <= width; i += W) store<W>(packed + i, load<W>(from + i));
    for (; i < width; ++i) packed[i] = to_float(from[i]);
    for (; i < padded; ++i) packed[i] = 0;
  }
}

template <int W>
STELLAR_FAST_INLINE void pack_tokens(const Tokens &x, int image, int view, int count, int width, float *packed) {
  const ptrdiff_t offset = image * x.image_stride + view * x.view_stride;
  if (x.is_bfloat16)
    pack_tokens_of<W>(static_cast<const bfloat16 *>(x.data) + offset, x.token_stride, count, width, packed);
  else
    pack_tokens_of<W>(static_cast<const float *>(x.data) + offset, x.token_stride, count, width, packed);
}

// Clang has no shuffle by a vector of lanes, and GCC before 12 none by constants.
#ifdef __clang__
#define STELLAR_FAST_SHUFFLE_PAIRS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define STELLAR_FAST_SHUFFLE_PAIRS(a, b, ...) __builtin_shuffle(a, b, i32v<W>{__VA_ARGS__})
#endif

// Both vectors hold groups of 2 Half lanes; each group is folded to Half lanes, those of `a` in front.
template <int W, int Half, int... I>
STELLAR_FAST_INLINE f32v<W> fold_two(f32v<W> a, f32v<W> b, std::integer_sequence<int, I...>) {
  return STELLAR_FAST_SHUFFLE_PAIRS(a, b, (I / Half * 2 * Half + I % Half)...) +
         STELLAR_FAST_SHUFFLE_PAIRS(a, b, (I / Half * 2 * Half + I % Half + Half)...);
}

// Lane i of v[0] becomes the sum of the lanes of v[i], of W vectors. Each is added up in the same order.
template <int W, int Half = W / 2>
STELLAR_FAST_INLINE void fold(f32v<W> *v) {
#pragma GCC unroll 8
  for (int i = 0; i < Half; ++i) v[i] = fold_two<W, Half>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, W>());
  if constexpr (Half > 1) fold<W, Half / 2>(v);
}

enum class Pair { kProduct, kSquaredDifference };

// out[i * stride + j] = the sum of products, or of squared differences, of row i of `a` and row j of `b`: `count` rows of pairs_padded(width)
// floats each. `out` has room for pairs_padded(count) rows, and stride >= pairs_padded(count); what pads it is finite where the rows are.
// Every pair is added up in the same order, so that equal rows have equal results. Where `a` is `b`, half of it is copied.
template <int W, Pair kPair>
STELLAR_FAST_INLINE void pair_sums(const float *a, const float *b, int count, int width, float *out, int stride) {
  typedef f32v<W> F;
  constexpr int kRows = 4, kColumns = W == 16 ? 4 : 2;  // of a tile, by the number of vector registers
  const int padded = pairs_padded(width);
  for (int i = 0; i < count; i += kRows) {
    const float *rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = a + size_t(i + r < count ? i + r : count - 1) * padded;
    for (int j = a == b ? i : 0; j < count; j += kColumns) {
      const float *columns[kColumns];
      for (int c = 0; c < kColumns; ++c) columns[c] = b + size_t(j + c < count ? j + c : count - 1) * padded;
      F sums[kRows * kColumns]{};
      for (int d = 0; d < padded; d += W) {
        F column[kColumns];
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) column[c] = load<W>(columns[c] + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const F row = load<W>(rows[r] + d);
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) {
            const F difference = row - column[c];
            sums[r * kColumns + c] += kPair == Pair::kProduct ? row * column[c] : difference * difference;
          }
        }
      }
      float tile[kRows * kColumns];
#pragma GCC unroll 2
      for (int v = 0; v < kRows * kColumns; v += W) {
        fold<W>(sums + v);
        store<W>(tile + v, sums[v]);
      }
      for (int r = 0; r < kRows; ++r) std::memcpy(out + (i + r) * stride + j, tile + r * kColumns, kColumns * sizeof(float));
    }
    for (int r = i; a == b && r < i + kRows; ++r)
      for (int j = 0; j < i; ++j) out[r * stride + j] = out[j * stride + r];
  }
}

// index[j] = the row with the largest scores[row * stride + j], the lowest such row on a tie; a NaN is never the largest.
template <int W>
STELLAR_FAST_INLINE void largest_rows(const float *scores, int count, int stride, int32_t *index) {
  for (int j = 0; j < count; j += W) {
    f32v<W> best = f32v<W>{} - std::numeric_limits<float>::infinity();
    i32v<W> row = {};
    for (int i = 0; i < count; ++i) {
      const f32v<W> score = load<W>(scores + i * stride + j);
      const i32v<W> better = score > best;
      best = select<W>(better, score, best);
      row = (better & i) | (~better & row);
    }
    std::memcpy(index + j, &row, sizeof row);
  }
}

}  // namespace stellar_fast
