// Mean and variance of groups of channels: sums of a task's values, moments of its groups, and their total in the order of the tasks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "common/vec.h"

namespace stellar_fast {

// Sums of a channel's values around one of them, so that a mean far larger than the deviation leaves the variance its digits. Three arrays
// of padded channels.
struct ChannelSums {
  float *around, *first, *second;  // the value that is taken off, the sum of what is left, and of its squares
};

inline ChannelSums channel_sums(float *memory, int channels) { return {memory, memory + pad(channels), memory + 2 * pad(channels)}; }
inline size_t channel_sums_size(int channels) { return 3 * pad(channels); }

struct Moments {
  double count, mean, squares;  // squares: of the distance to the mean, summed
};

inline Moments combined(const Moments &a, const Moments &b) {
  const double count = a.count + b.count;
  if (count == 0) return a;
  const double off = b.mean - a.mean;
  return {count, a.mean + off * (b.count / count), a.squares + b.squares + off * off * (a.count * (b.count / count))};
}

// Moments of each group of one task; every channel has `count` values.
inline void group_moments(const ChannelSums &sums, int channels, int groups, double count, Moments *moments) {
  const int size = channels / groups;
  for (int g = 0; g < groups; ++g) {
    double mean = 0, squares = 0;
    for (int c = g * size; c < (g + 1) * size; ++c) mean += sums.around[c] + sums.first[c] / count;
    mean /= size;
    for (int c = g * size; c < (g + 1) * size; ++c) {
      const double off = sums.around[c] + sums.first[c] / count - mean;
      squares += sums.second[c] - sums.first[c] * (sums.first[c] / count) + count * (off * off);
    }
    moments[g] = {count * size, mean, squares};
  }
}

// moments (images, tasks of an image, groups)
inline void write_stats(const std::vector<Moments> &moments, int images, int tasks, int groups, float *stats) {
  for (int n = 0; n < images; ++n)
    for (int g = 0; g < groups; ++g) {
      Moments total{};
      for (int t = 0; t < tasks; ++t) total = combined(total, moments[(size_t(n) * tasks + t) * groups + g]);
      float *to = stats + (size_t(n) * groups + g) * 2;
      to[0] = float(total.mean);
      to[1] = float(std::max(total.squares, 0.0) / total.count);
    }
}

// Adds a vector of values to the sums of the channels from c on.
template <int W>
STELLAR_FAST_INLINE void add_values(const ChannelSums &sums, int c, f32v<W> value, bool is_first) {
  if (is_first) {
    store<W>(sums.around + c, value);
    store<W>(sums.first + c, f32v<W>{});
    store<W>(sums.second + c, f32v<W>{});
    return;
  }
  const f32v<W> off = value - load<W>(sums.around + c);
  store<W>(sums.first + c, load<W>(sums.first + c) + off);
  store<W>(sums.second + c, load<W>(sums.second + c) + off * off);
}

}  // namespace stellar_fast
