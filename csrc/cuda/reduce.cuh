// Sums of several values over the lanes of a warp that share a row.
#pragma once

#include "device.cuh"

namespace noetherperf {

// Lanes of the smallest group. This many lanes hold sums afterwards, an equal share each.
constexpr int n_holders = 8;

// How many of n values each of them holds: n, halved three times.
template <int n>
constexpr int halved = (n + 1) / 2;
template <int n>
constexpr int n_held = halved<halved<halved<n>>>;

// Slots for n values: an equal share for each holder.
template <int n>
constexpr int n_slots = n_holders * n_held<n>;

// Halves n values over two lanes: the lower lane keeps the first half of both lanes' sums, the upper one the rest.
template <int n, int size, class S>
NPERF_D void halve(S (&values)[size], int offset) {
  constexpr int half = halved<n>;
  const bool upper = threadIdx.x & offset;
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const S low = values[k], high = k + half < n ? values[k + half] : S(0);
    values[k] = (upper ? high : low) + __shfl_xor_sync(all_lanes, upper ? low : high, offset);
  }
}

// Sums n values over a group of lanes, all at once: 8 shuffles for 6 values, instead of 30 one by one.
// Afterwards lane group / n_holders · h holds the sums of holder h, in its first values.
template <int n, int size, class S>
NPERF_D void sum_over_group(S (&values)[size], int group) {
  static_assert(size >= n_slots<n>);
  constexpr int held = n_held<n>;
  halve<n>(values, group / 2);
  halve<halved<n>>(values, group / 4);
  halve<halved<halved<n>>>(values, group / 8);
  for (int offset = group / 16; offset > 0; offset /= 2)
#pragma unroll
    for (int k = 0; k < held; ++k) values[k] += __shfl_xor_sync(all_lanes, values[k], offset);
}

// The slot of value m of n: its holder's share, then its place among what the holder holds.
template <int n>
NPERF_D int slot_of(int m) {
  constexpr int half = halved<n>, quarter = halved<half>, held = n_held<n>;
  const int in_quarter = m % half % quarter;
  return (m / half * 4 + m % half / quarter * 2 + in_quarter / held) * held + in_quarter % held;
}

}  // namespace noetherperf
