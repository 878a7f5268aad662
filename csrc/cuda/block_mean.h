// Device side: means over the averaging blocks of a tile (Eq. 7) in shared memory. The order of the additions depends
// on the parameter's geometry only.
#pragma once

#include "tile.h"

namespace adahessian::gpu {

// The values of a tile in logical order, later the mean of every block in place of its first value. One number in
// 128 bytes is left out, so that threads that walk through neighbouring chunks use different banks.
template <typename S, int kTile>
struct Blocks {
  static constexpr int kPad = 128 / sizeof(S);
  SharedArray<S, kTile + kTile / kPad> value;
  SharedArray<double, kThreads + kThreads / 16> lane_sum;
  SharedArray<double, kThreads / 16> group_sum;  // of 16 lanes
};

template <typename S, int kTile>
ADAHESSIAN_HD S& value_at(Blocks<S, kTile>& blocks, int logical) {
  return at(blocks.value, int(logical + uint32_t(logical) / Blocks<S, kTile>::kPad));
}

// A slot's elements to their logical places.
template <Order kOrder, typename S, int kVector, int kTile>
ADAHESSIAN_HD void scatter(Blocks<S, kTile>& blocks, const Vec<S, kVector>& d, const Tile& t, const Slot& slot) {
  // Neighbours with nothing left out between them.
  if (t.layout == Layout::kFlat && is_full<kVector>(slot) && slot.local % kVector == 0) {
    S* values = &value_at(blocks, slot.local);
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) values[e] = get(d, e);
    return;
  }
  ADAHESSIAN_UNROLL
  for (int e = 0; e < kVector; ++e) {
    if (has(slot, e)) value_at(blocks, logical_index<kOrder>(t, slot, e)) = get(d, e);
  }
}

// The means of the blocks that hold a slot's elements.
template <Order kOrder, typename S, int kVector, int kTile>
ADAHESSIAN_HD void gather(Vec<S, kVector>& means, Blocks<S, kTile>& blocks, const Tile& t, const Slot& slot) {
  // Neighbours are in one block or, some of them, in the next.
  if (t.layout == Layout::kFlat && is_full<kVector>(slot) && t.unit >= kVector) {
    const int unit = quotient(slot.local, t.by_unit), left = (unit + 1) * t.unit - slot.local;
    const S here = value_at(blocks, unit * t.unit);
    const S behind = value_at(blocks, (left < kVector ? unit + 1 : unit) * t.unit);
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) set(means, e, e < left ? here : behind);
    return;
  }
  ADAHESSIAN_UNROLL
  for (int e = 0; e < kVector; ++e) {
    set(means, e, value_at(blocks, quotient(logical_index<kOrder>(t, slot, e), t.by_unit) * t.unit));
  }
}

template <typename S, int kTile>
ADAHESSIAN_HD double& lane_sum(Blocks<S, kTile>& blocks, int lane) {
  return at(blocks.lane_sum, lane + lane / 16);
}

// How many elements the blocks of a tile average over; the last block of a parameter may be shorter.
struct Lengths {
  int64_t block, rest;  // rest: from the tile's first element to the parameter's end
};

ADAHESSIAN_HD int64_t length_of(const Lengths& lengths, int unit) {
  const int64_t rest = lengths.rest - unit * lengths.block;
  return rest < lengths.block ? rest : lengths.block;
}

template <typename S, int kTile>
ADAHESSIAN_HD S sum_range(Blocks<S, kTile>& blocks, int begin, int end) {
  S sum = 0;
  for (int i = begin; i < end; ++i) sum += value_at(blocks, i);
  return sum;
}

ADAHESSIAN_HD int min_of(int a, int b) { return a < b ? a : b; }

// Step 1. Units with a thread of their own are finished here; otherwise each lane adds up its chunk of a unit.
template <typename S, int kTile>
ADAHESSIAN_HD void sum_chunks(Blocks<S, kTile>& blocks, const Tile& t, const Lengths& lengths, int thread) {
  if (t.lanes == 1) {
    for (int unit = thread; unit < t.units; unit += kThreads) {
      const int begin = unit * t.unit;
      const S sum = sum_range(blocks, begin, min_of(begin + t.unit, t.count));
      value_at(blocks, begin) = sum / S(length_of(lengths, unit));
    }
  } else if (thread < t.units * t.lanes) {
    const int unit = thread / t.lanes;
    const int begin = unit * t.unit + (thread - unit * t.lanes) * t.chunk;
    lane_sum(blocks, thread) = sum_range(blocks, begin, min_of(min_of(begin + t.chunk, (unit + 1) * t.unit), t.count));
  }
}

// Step 2: sums of 16 lanes, in double from here on.
template <typename S, int kTile>
ADAHESSIAN_HD void sum_lanes(Blocks<S, kTile>& blocks, const Tile& t, int thread) {
  if (t.lanes <= 16 || thread >= t.units * t.lanes / 16) return;
  double sum = 0;
  ADAHESSIAN_UNROLL
  for (int lane = 0; lane < 16; ++lane) sum += lane_sum(blocks, 16 * thread + lane);
  at(blocks.group_sum, thread) = sum;
}

// Step 3: the sum of one unit.
template <typename S, int kTile>
ADAHESSIAN_HD double sum_of_unit(Blocks<S, kTile>& blocks, const Tile& t, int unit) {
  const int parts = t.lanes > 16 ? t.lanes / 16 : t.lanes;
  double sum = 0;
  for (int part = unit * parts; part < (unit + 1) * parts; ++part) {
    sum += t.lanes > 16 ? at(blocks.group_sum, part) : lane_sum(blocks, part);
  }
  return sum;
}

// All steps, after the values have been written and a barrier: leaves the means.
template <class Executor, typename S, int kTile>
ADAHESSIAN_HD void average_blocks(Executor& executor, Blocks<S, kTile>& blocks, const Tile& t, const Lengths& lengths) {
  executor.phase([&](int thread, auto&) { sum_chunks(blocks, t, lengths, thread); });
  if (t.lanes == 1) return;
  executor.phase([&](int thread, auto&) { sum_lanes(blocks, t, thread); });
  executor.phase([&](int thread, auto&) {
    if (thread >= t.units) return;
    value_at(blocks, thread * t.unit) = S(sum_of_unit(blocks, t, thread) / double(length_of(lengths, thread)));
  });
}

}  // namespace adahessian::gpu
