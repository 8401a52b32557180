// What stands between the products of a block of rows: softmax, targets, loss and the gradient of the logits, in place. A row of logits
// (64 KiB at 16,384 prototypes) is read from the third-level cache once; its exponentials and its target stay in the second.
#include "prototype_cross_entropy/prototype_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "common/vec.h"

namespace stellar_fast {
namespace {

constexpr int kChains = 4;      // sums that run side by side: one alone would wait for the latency of each addition
constexpr int kSegment = 2048;  // elements that are summed in fp32 before they join a double
constexpr float kLargest = 88.0f;  // exp of more leaves fp32

template <int W>
STELLAR_FAST_INLINE float total_of(const f32v<W> (&sums)[kChains]) {
  return sum<W>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// body(first element of a vector, how many it has, number of the chain) from `begin` to `end`.
template <int W, typename Body>
STELLAR_FAST_INLINE void for_vectors(int begin, int end, Body body) {
  int i = begin;
  for (; i + kChains * W <= end; i += kChains * W) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) body(i + chain * W, W, chain);
  }
  for (; i < end; i += W) body(i, std::min(W, end - i), 0);
}
#define STELLAR_FAST_BODY [&](int i, int n, int chain) __attribute__((always_inline))

struct Call {
  int prototypes;
  void *logits;
  bool is_bfloat16;
  const PrototypeTargets &targets;
  float temperature;
  const float *weights;
  double *loss;
  const int *order;  // rows, those of one target next to each other
};

int64_t target_of(const PrototypeTargets &targets, int row) { return targets.index ? targets.index[row] : row; }

// Writes the target's probabilities and returns their sum.
template <int W, typename L>
STELLAR_FAST_INLINE double write_target(const PrototypeTargets &targets, int64_t target, int prototypes, float *out) {
  typedef f32v<W> F;
  const L *logits = (const L *)targets.logits + target * targets.stride;
  const float row = targets.row[target];
  double mass = 0;
  for (int begin = 0; begin < prototypes; begin += kSegment) {
    F sums[kChains]{};
    for_vectors<W>(begin, std::min(prototypes, begin + kSegment), STELLAR_FAST_BODY {
      // zeros past the end have a potential of -inf
      F power = load_first<W>(logits + i, n, 0.0f) / targets.temperature + load_first<W>(targets.column + i, n, -INFINITY) + row;
      power = select<W>(power > kLargest, F{} + kLargest, power);
      const F probability = exp<W>(power);
      store<W>(out + i, probability);
      sums[chain] += probability;
    });
    mass += total_of<W>(sums);
  }
  return mass;
}

// Rows [first, last) of the order. `lines` holds two padded rows of floats: exponentials and target.
template <int W, typename T>
STELLAR_FAST_INLINE void rows_of(const Call &call, int first, int last, float *lines) {
  typedef f32v<W> F;
  const int prototypes = call.prototypes;
  const PrototypeTargets &targets = call.targets;
  const float inverse = 1 / call.temperature;
  float *exps = lines, *target = lines + pad(prototypes);
  int64_t present = -1;
  double mass = 1;
  for (int at = first; at < last; ++at) {
    const int row = call.order[at];
    T *x = (T *)call.logits + (ptrdiff_t)row * prototypes;
    const int64_t wanted = target_of(targets, row);
    if (!targets.classes && wanted != present) {
      mass = targets.is_bfloat16 ? write_target<W, bfloat16>(targets, wanted, prototypes, target)
                                 : write_target<W, float>(targets, wanted, prototypes, target);
      present = wanted;
    }

    F tops[kChains];
    std::fill(tops, tops + kChains, F{} - INFINITY);
    for_vectors<W>(0, prototypes, STELLAR_FAST_BODY { tops[chain] = maximum<W>(tops[chain], load_first<W>(x + i, n, -INFINITY)); });
    const float top = maximum_of<W>(maximum<W>(maximum<W>(tops[0], tops[1]), maximum<W>(tops[2], tops[3])));

    double sum_of_exps = 0, below = 0;  // below = sum_c t_c (top - x_c): no term cancels another
    for (int begin = 0; begin < prototypes; begin += kSegment) {
      F sums[kChains]{}, products[kChains]{};
      for_vectors<W>(begin, std::min(prototypes, begin + kSegment), STELLAR_FAST_BODY {
        const F down = (load_first<W>(x + i, n, -INFINITY) - top) * inverse;
        const F e = exp<W>(down);
        store<W>(exps + i, e);
        sums[chain] += e;
        if (!targets.classes) {
          const F t = load<W>(target + i);
          // a target of zero may meet an infinite distance
          products[chain] -= select<W>(t == 0.0f, F{}, t * down);
        }
      });
      sum_of_exps += total_of<W>(sums);
      below += total_of<W>(products);
    }
    const int64_t chosen = targets.classes ? targets.classes[wanted] : 0;
    if (targets.classes) below = ((double)top - to_float(x[chosen])) * inverse;
    call.loss[row] = mass * std::log(sum_of_exps) + below;
    if (!call.weights) continue;

    const float scale = call.weights[row] * inverse, share = float(mass / sum_of_exps);
    if (targets.classes) {
      const float at_chosen = (exps[chosen] * share - 1) * scale;
      for_vectors<W>(0, prototypes, STELLAR_FAST_BODY {
        (void)chain;
        store_first<W>(x + i, load<W>(exps + i) * (share * scale), n);
      });
      from_float(x + chosen, at_chosen);
    } else {
      for_vectors<W>(0, prototypes, STELLAR_FAST_BODY {
        (void)chain;
        store_first<W>(x + i, (load<W>(exps + i) * share - load<W>(target + i)) * scale, n);
      });
    }
  }
}

template <int W>
STELLAR_FAST_INLINE void some_rows_body(const Call &call, int first, int last, float *lines) {
  if (call.is_bfloat16)
    rows_of<W, bfloat16>(call, first, last, lines);
  else
    rows_of<W, float>(call, first, last, lines);
}

STELLAR_FAST_BY_LEVEL(some_rows, (const Call &call, int first, int last, float *lines), (call, first, last, lines))

}  // namespace

void prototype_cross_entropy_rows(int count, int prototypes, void *logits, bool is_bfloat16, const PrototypeTargets &targets,
                                  float temperature, const float *weights, double *loss, int threads) {
  // Views of a token learn from one target, whose exponentials are then computed once.
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return target_of(targets, a) < target_of(targets, b); });
  const Call call{prototypes, logits, is_bfloat16, targets, temperature, weights, loss, order.data()};
  const std::unique_ptr<float[]> lines(new float[(size_t)threads * 2 * pad(prototypes)]);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t)
    some_rows(call, int((long long)count * t / threads), int((long long)count * (t + 1) / threads), &lines[(size_t)t * 2 * pad(prototypes)]);
}

}  // namespace stellar_fast
