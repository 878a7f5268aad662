// All parameters moved along the probe in one launch: kernel body and planning, for the GPU and for its emulation.
#pragma once

#include "probe.h"
#include "table.h"

namespace adahessian::gpu {

template <typename T>
struct PerturbRow {
  Geometry geometry;
  int64_t offset;  // in the saved values
  T* param;
  ProbeRow probe;
  uint32_t first_tile;
  uint32_t constant;
  uint64_t aligned;  // this wide to leave no padding
};

template <typename T>
struct PerturbArguments {
  using TableType = Table<PerturbRow<T>, ProbeConstant, 24>;
  T* saved;
  StateOf<T> scale;  // 0: put the saved values back as they are
  uint32_t save;
  ProbeSource probe;
  TableType table;
};

template <typename T, Order kOrder>
struct PerturbBody {
  using Arguments = PerturbArguments<T>;
  struct Shared {
    PerturbRow<T> row;
    ProbeConstant constant;
    Tile tile;
    Signs<Traits<T>::kTile> signs;
  };
  struct Thread {};
  static constexpr int kBlocksPerSm = kOrder == Order::kFlat ? 6 : 4;
};

template <typename T, Order kOrder>
ADAHESSIAN_HD void move_slots(const PerturbArguments<T>& arguments, typename PerturbBody<T, kOrder>::Shared& shared,
                              int thread) {
  constexpr int kVector = Traits<T>::kVector;
  const PerturbRow<T>& row = shared.row;
  T* saved = arguments.saved + row.offset;
  Vec<T, kVector> values[Traits<T>::kSlots];
  // All reads first, so that they are in flight together.
  ADAHESSIAN_UNROLL
  for (int i = 0; i < Traits<T>::kSlots; ++i) {
    const Slot slot = slot_of<kVector, kOrder>(shared.tile, thread + i * kThreads);
    load<kOrder>(values[i], arguments.save ? row.param : saved, shared.tile, slot, row.aligned);
  }
  ADAHESSIAN_UNROLL
  for (int i = 0; i < Traits<T>::kSlots; ++i) {
    const Slot slot = slot_of<kVector, kOrder>(shared.tile, thread + i * kThreads);
    if (arguments.save) store<kOrder>(saved, values[i], shared.tile, slot, row.aligned);
    if (arguments.scale != 0) {
      const uint32_t negative = negative_signs<kVector, kOrder>(shared.signs, shared.tile, slot);
      ADAHESSIAN_UNROLL
      for (int e = 0; e < kVector; ++e) {
        const StateOf<T> step = negative >> e & 1 ? -arguments.scale : arguments.scale;
        set(values[i], e, stored<T>(load_as(get(values[i], e)) + step));
      }
    }
    store<kOrder>(row.param, values[i], shared.tile, slot, row.aligned);
  }
}

template <typename T, Order kOrder, class Executor>
ADAHESSIAN_HD void run(PerturbBody<T, kOrder>, Executor& executor, const PerturbArguments<T>& arguments,
                       typename PerturbBody<T, kOrder>::Shared& shared, uint32_t tile) {
  executor.phase([&](int thread, auto&) {
    if (thread != 0) return;
    shared.row = row_of_tile(arguments.table, tile);
    shared.constant = constant_of_row(arguments.table, shared.row);
    shared.tile = cut<Traits<T>::kVector, kOrder>(shared.row.geometry, tile - shared.row.first_tile);
  });
  executor.phase([&](int thread, auto&) {
    draw_signs(shared.signs, arguments.probe, shared.row.probe, shared.constant, shared.tile, thread);
  });
  executor.last([&](int thread, auto&) { move_slots<T, kOrder>(arguments, shared, thread); });
}

template <typename T, class Device>
void perturb(const PerturbArgs& args, Device& device) {
  PerturbArguments<T> arguments;
  arguments.saved = static_cast<T*>(args.saved);
  arguments.scale = StateOf<T>(args.scale);
  arguments.save = args.save;
  arguments.probe = probe_source(args.probe, args.counts);
  std::vector<PerturbRow<T>> rows;
  rows.reserve(args.segments.size());
  ProbeConstants constants(args.counts);
  bool ordered = false;
  for (const Segment& s : args.segments) {
    if (s.numel == 0) continue;
    T* param = static_cast<T*>(s.param);
    const Geometry geometry = Tiler::of<T>().ordered(s.numel, 1, s.period, s.stride);
    const bool aligned =
        geometry.takes_vectors(Traits<T>::kVector) && is_aligned(param) && is_aligned(arguments.saved + s.offset);
    rows.push_back({geometry, s.offset, param, probe_row(s), 0, constants.index_of(s), aligned});
    ordered |= geometry.layout != Layout::kFlat;
  }
  if (ordered) {
    launch_rows<PerturbBody<T, Order::kAny>>(device, arguments, rows, constants.get());
  } else {
    launch_rows<PerturbBody<T, Order::kFlat>>(device, arguments, rows, constants.get());
  }
}

}  // namespace adahessian::gpu
