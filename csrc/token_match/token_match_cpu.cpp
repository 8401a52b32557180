// A problem is one view of an image. Its cost matrix never leaves the first-level cache; a thread takes consecutive problems and packs
// the targets once an image.
#include "token_match/token_match.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace stellar_fast {
namespace {

// What a thread works in. Costs are in units of epsilon, once as they are and once transposed, so that both updates run along lanes.
struct Scratch {
  float *target, *pred, *cost, *transposed, *u, *v;

  static size_t size(const TokenMatch &c) {
    const size_t side = pairs_padded(c.tokens);
    return 2 * c.tokens * size_t(pairs_padded(c.width)) + 2 * side * side + 2 * side;
  }
  Scratch(const TokenMatch &c, float *data) {
    const size_t side = pairs_padded(c.tokens), rows = c.tokens * size_t(pairs_padded(c.width));
    target = data;
    pred = target + rows;
    cost = pred + rows;
    transposed = cost + side * side;
    u = transposed + side * side;
    v = u + side;
  }
};

// Fills `cost` with the distances of problem n, over epsilon; the targets are in place where its image is `packed`.
template <int W>
STELLAR_FAST_INLINE void distances(const TokenMatch &c, int n, int &packed, const Scratch &s) {
  const int image = n / c.views, stride = pairs_padded(c.tokens);
  if (image != packed) pack_tokens<W>(c.target, image, 0, c.tokens, c.width, s.target);
  packed = image;
  pack_tokens<W>(c.pred, image, n % c.views, c.tokens, c.width, s.pred);
  pair_sums<W, Pair::kSquaredDifference>(s.pred, s.target, c.tokens, c.width, s.cost, stride);
  const float factor = 1 / c.epsilon;
  for (int i = 0; i < c.tokens * stride; ++i) s.cost[i] = std::sqrt(s.cost[i]) * factor;
}

// out_j = -log sum_i exp(other_i - cost_ij)
template <int W>
STELLAR_FAST_INLINE void update(const float *cost, const float *other, int count, int stride, float *out) {
  typedef f32v<W> F;
  for (int j = 0; j < count; j += W) {
    F best = other[0] - load<W>(cost + j), total = {};
    for (int i = 1; i < count; ++i) best = maximum<W>(other[i] - load<W>(cost + i * stride + j), best);
    for (int i = 0; i < count; ++i) total += exp<W>((other[i] - load<W>(cost + i * stride + j)) - best);
    store<W>(out + j, -(best + log<W>(total)));
  }
}

// `largest` of all costs is read where targets are filtered.
template <int W>
STELLAR_FAST_INLINE void match_body(const TokenMatch &c, int first, int last, float largest, float *scratch) {
  const Scratch s(c, scratch);
  const int K = c.tokens, stride = pairs_padded(K);
  int packed = -1;
  std::fill(s.transposed, s.transposed + stride * stride, 0.0f);  // what pads it is computed on, to no effect
  for (int n = first; n < last; ++n) {
    distances<W>(c, n, packed, s);
    const uint8_t *keep = c.keep ? c.keep + ptrdiff_t(n / c.views) * K : nullptr;
    for (int i = 0; i < K; ++i) {
      float *row = s.cost + i * stride;
      for (int j = 0; keep && j < K; ++j) row[j] = keep[j] ? row[j] : 2 * largest;
      for (int j = 0; j < K; ++j) s.transposed[j * stride + i] = row[j];
    }
    std::fill(s.v, s.v + stride, 0.0f);
    for (int round = 0; round < c.iterations; ++round) {
      update<W>(s.transposed, s.v, K, stride, s.u);
      update<W>(s.cost, s.u, K, stride, s.v);
    }
    if (c.plan) {
      float *plan = c.plan + ptrdiff_t(n) * K * K;
      for (int i = 0; i < K; ++i, plan += K) {
        float row[kTokenMatchMaxTokens];
        for (int j = 0; j < K; j += W) store<W>(row + j, exp<W>((s.u[i] + load<W>(s.v + j)) - load<W>(s.cost + i * stride + j)));
        std::copy(row, row + K, plan);
      }
    }
    // the largest of a row of the plan, found before its exponential rounds
    for (int j = 0; j < K; ++j) {
      float *scores = s.transposed + j * stride;
      for (int i = 0; i < stride; i += W) store<W>(scores + i, s.v[j] - load<W>(scores + i));
    }
    int32_t index[kTokenMatchMaxTokens];
    largest_rows<W>(s.transposed, K, stride, index);
    std::copy(index, index + K, c.index + ptrdiff_t(n) * K);
  }
}
STELLAR_FAST_BY_LEVEL(match, (const TokenMatch &c, int first, int last, float largest, float *scratch), (c, first, last, largest, scratch))

template <int W>
STELLAR_FAST_INLINE void largest_cost_body(const TokenMatch &c, int first, int last, float *scratch, float &largest) {
  const Scratch s(c, scratch);
  const int K = c.tokens, stride = pairs_padded(K);
  int packed = -1;
  for (int n = first; n < last; ++n) {
    distances<W>(c, n, packed, s);
    for (int i = 0; i < K; ++i) largest = std::max(largest, *std::max_element(s.cost + i * stride, s.cost + i * stride + K));
  }
}
STELLAR_FAST_BY_LEVEL(largest_cost, (const TokenMatch &c, int first, int last, float *scratch, float &largest), (c, first, last, scratch, largest))

}  // namespace

void token_match(const TokenMatch &call, int threads) {
  const int problems = call.images * call.views;
  threads = std::max(1, std::min(threads, problems));
  const size_t size = Scratch::size(call);
  const AlignedFloats scratch(threads * size);
  const auto start = [&](int t) { return int(static_cast<long long>(problems) * t / threads); };
  std::vector<float> largest(threads, 0.0f);
  if (call.keep) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) largest_cost(call, start(t), start(t + 1), scratch.get() + t * size, largest[t]);
    largest[0] = *std::max_element(largest.begin(), largest.end());
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) match(call, start(t), start(t + 1), largest[0], scratch.get() + t * size);
}

}  // namespace stellar_fast
