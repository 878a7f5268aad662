// The block-averaged Hutchinson diagonal (Eq. 6 and 7): kernel body and planning, for the GPU and for its emulation.
//
// Blocks that fit into a tile take one launch. Longer ones leave one partial sum a tile in a workspace; the partial
// sums of a block are a block of a shorter array, which the same body reduces in its turn.
#pragma once

#include "block_mean.h"
#include "probe.h"
#include "table.h"

namespace adahessian::gpu {

struct HessianDiagRow {
  static constexpr uint32_t kHessianAligned = 1;
  static constexpr uint32_t kTargetAligned = 2;
  static constexpr uint32_t kAbsolute = 4;
  static constexpr uint32_t kElementwise = 8;   // blocks of one element in storage order
  static constexpr uint32_t kPartial = 16;      // the target is a double for each tile, its sum
  static constexpr uint32_t kFloatTarget = 32;  // the target is float although the kernel computes in double
  Geometry geometry;
  const void* hessian;
  void* target;
  int64_t mean_block, mean_numel;  // the elements that a block stands for: more than geometry says for partial sums
  ProbeRow probe;
  uint32_t first_tile;
  uint32_t constant;
  uint64_t flags;  // this wide to leave no padding
};

struct HessianDiagArguments {
  using TableType = Table<HessianDiagRow, ProbeConstant, 24>;
  ProbeSource probe;
  double scale;
  bool accumulate;
  TableType table;
};

template <typename T>
struct HessianDiagBody {
  using Arguments = HessianDiagArguments;
  struct Shared {
    HessianDiagRow row;
    ProbeConstant constant;
    Tile tile;
    Signs<Traits<T>::kTile> signs;
    Blocks<StateOf<T>, Traits<T>::kTile> blocks;
  };
  struct Thread {
    Vec<T, Traits<T>::kVector> hessian[Traits<T>::kSlots];
  };
  static constexpr int kBlocksPerSm = 4;
};

ADAHESSIAN_HD float magnitude(float x) { return fabsf(x); }
ADAHESSIAN_HD double magnitude(double x) { return fabs(x); }

// D = z * Hz, or |D|, of one slot.
template <typename T, Order kOrder, int kTile>
ADAHESSIAN_HD void multiply_probe(Vec<StateOf<T>, Traits<T>::kVector>& d, const Vec<T, Traits<T>::kVector>& hessian,
                                  const Signs<kTile>& signs, const Tile& tile, const Slot& slot, bool is_hvp,
                                  bool absolute) {
  constexpr int kVector = Traits<T>::kVector;
  const uint32_t negative = is_hvp && !absolute ? negative_signs<kVector, kOrder>(signs, tile, slot) : 0;
  ADAHESSIAN_UNROLL
  for (int e = 0; e < kVector; ++e) {
    const StateOf<T> h = load_as(get(hessian, e));
    set(d, e, absolute ? magnitude(h) : negative >> e & 1 ? -h : h);
  }
}

template <typename Target>
ADAHESSIAN_HD void write_mean(void* target, int64_t index, double mean, const HessianDiagArguments& arguments) {
  Target& place = in_global(static_cast<Target*>(target))[index];
  const Target scaled = Target(mean) * Target(arguments.scale);
  place = arguments.accumulate ? place + scaled : scaled;
}

// Blocks of one element whose order in `diag` is the order of storage: as wide as the loads.
template <typename T>
ADAHESSIAN_HD void write_elements(const HessianDiagArguments& arguments, typename HessianDiagBody<T>::Shared& shared,
                                  typename HessianDiagBody<T>::Thread& state, int thread) {
  using S = StateOf<T>;
  constexpr int kVector = Traits<T>::kVector;
  const uint32_t flags = uint32_t(shared.row.flags);
  const bool aligned = flags & HessianDiagRow::kTargetAligned;
  S* target = static_cast<S*>(shared.row.target);
  ADAHESSIAN_UNROLL
  for (int i = 0; i < Traits<T>::kSlots; ++i) {
    const Slot slot = slot_of<kVector, Order::kFlat>(shared.tile, thread + i * kThreads);
    Vec<S, kVector> d, old = {};
    if (arguments.accumulate) load<Order::kFlat>(old, target, shared.tile, slot, aligned);
    multiply_probe<T, Order::kFlat>(d, state.hessian[i], shared.signs, shared.tile, slot, arguments.probe.is_hvp,
                                    flags & HessianDiagRow::kAbsolute);
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) set(d, e, get(old, e) + get(d, e) * S(arguments.scale));
    store<Order::kFlat>(target, d, shared.tile, slot, aligned);
  }
}

template <typename T>
ADAHESSIAN_HD void write_means(const HessianDiagArguments& arguments, typename HessianDiagBody<T>::Shared& shared,
                               int thread) {
  const Tile& tile = shared.tile;
  for (int unit = thread; unit < tile.units; unit += kThreads) {
    const StateOf<T> mean = value_at(shared.blocks, unit * tile.unit);
    if (shared.row.flags & HessianDiagRow::kFloatTarget) {
      write_mean<float>(shared.row.target, tile.first_block + unit, mean, arguments);
    } else {
      write_mean<StateOf<T>>(shared.row.target, tile.first_block + unit, mean, arguments);
    }
  }
}

template <typename T, class Executor>
ADAHESSIAN_HD void run(HessianDiagBody<T>, Executor& executor, const HessianDiagArguments& arguments,
                       typename HessianDiagBody<T>::Shared& shared, uint32_t tile_number) {
  constexpr int kVector = Traits<T>::kVector;
  HessianDiagRow& row = shared.row;
  Tile& tile = shared.tile;
  executor.phase([&](int thread, auto&) {
    if (thread != 0) return;
    row = row_of_tile(arguments.table, tile_number);
    shared.constant = constant_of_row(arguments.table, row);
    tile = cut<kVector, Order::kAny>(row.geometry, tile_number - row.first_tile);
  });
  // Hz is on its way while the first threads draw the probe.
  executor.phase([&](int thread, auto& state) {
    ADAHESSIAN_UNROLL
    for (int i = 0; i < Traits<T>::kSlots; ++i) {
      const Slot slot = slot_of<kVector, Order::kAny>(tile, thread + i * kThreads);
      load<Order::kAny>(state.hessian[i], static_cast<const T*>(row.hessian), tile, slot,
                        row.flags & HessianDiagRow::kHessianAligned);
    }
    if (arguments.probe.is_hvp) draw_signs(shared.signs, arguments.probe, row.probe, shared.constant, tile, thread);
  });
  if (row.flags & HessianDiagRow::kElementwise) {
    executor.last([&](int thread, auto& state) { write_elements<T>(arguments, shared, state, thread); });
    return;
  }
  executor.phase([&](int thread, auto& state) {
    ADAHESSIAN_UNROLL
    for (int i = 0; i < Traits<T>::kSlots; ++i) {
      const Slot slot = slot_of<kVector, Order::kAny>(tile, thread + i * kThreads);
      Vec<StateOf<T>, kVector> d;
      multiply_probe<T, Order::kAny>(d, state.hessian[i], shared.signs, tile, slot, arguments.probe.is_hvp,
                                     row.flags & HessianDiagRow::kAbsolute);
      scatter<Order::kAny>(shared.blocks, d, tile, slot);
    }
  });
  const Lengths lengths = {row.mean_block, row.mean_numel - tile.first_block * row.mean_block};
  average_blocks(executor, shared.blocks, tile, lengths);
  executor.last([&](int thread, auto&) {
    if (!(row.flags & HessianDiagRow::kPartial)) {
      write_means<T>(arguments, shared, thread);
    } else if (thread == 0) {
      static_cast<double*>(in_global(row.target))[tile.first_block] = sum_of_unit(shared.blocks, tile, 0);
    }
  });
}

}  // namespace adahessian::gpu
