// The probe z of all parameters in one launch: kernel body and planning, for the GPU and for its emulation.
#pragma once

#include "probe.h"
#include "table.h"

namespace adahessian::gpu {

struct RademacherRow {
  Geometry geometry;
  int64_t offset;  // in z
  ProbeRow probe;
  uint32_t first_tile;
  uint32_t constant;
  uint64_t aligned;  // this wide to leave no padding
};

template <typename T>
struct RademacherArguments {
  using TableType = Table<RademacherRow, ProbeConstant, 24>;
  T* z;
  ProbeSource probe;
  TableType table;
};

template <typename T, Order kOrder>
struct RademacherBody {
  using Arguments = RademacherArguments<T>;
  struct Shared {
    RademacherRow row;
    ProbeConstant constant;
    Tile tile;
    Signs<Traits<T>::kTile> signs;
  };
  struct Thread {};
  static constexpr int kBlocksPerSm = kOrder == Order::kFlat ? 6 : 5;
};

template <typename T, Order kOrder>
ADAHESSIAN_HD void write_probe(const RademacherArguments<T>& arguments,
                               typename RademacherBody<T, kOrder>::Shared& shared, int thread) {
  constexpr int kVector = Traits<T>::kVector;
  ADAHESSIAN_UNROLL
  for (int i = 0; i < Traits<T>::kSlots; ++i) {
    const Slot slot = slot_of<kVector, kOrder>(shared.tile, thread + i * kThreads);
    const uint32_t negative = negative_signs<kVector, kOrder>(shared.signs, shared.tile, slot);
    Vec<T, kVector> z = {};
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) set(z, e, stored<T>(StateOf<T>(negative >> e & 1 ? -1 : 1)));
    store<kOrder>(arguments.z + shared.row.offset, z, shared.tile, slot, shared.row.aligned);
  }
}

template <typename T, Order kOrder, class Executor>
ADAHESSIAN_HD void run(RademacherBody<T, kOrder>, Executor& executor, const RademacherArguments<T>& arguments,
                       typename RademacherBody<T, kOrder>::Shared& shared, uint32_t tile) {
  executor.phase([&](int thread, auto&) {
    if (thread != 0) return;
    shared.row = row_of_tile(arguments.table, tile);
    shared.constant = constant_of_row(arguments.table, shared.row);
    shared.tile = cut<Traits<T>::kVector, kOrder>(shared.row.geometry, tile - shared.row.first_tile);
  });
  executor.phase([&](int thread, auto&) {
    draw_signs(shared.signs, arguments.probe, shared.row.probe, shared.constant, shared.tile, thread);
  });
  executor.last([&](int thread, auto&) { write_probe<T, kOrder>(arguments, shared, thread); });
}

template <typename T, class Device>
void rademacher(const RademacherArgs& args, Device& device) {
  RademacherArguments<T> arguments;
  arguments.z = static_cast<T*>(args.z);
  arguments.probe = probe_source(args.probe, args.counts);
  std::vector<RademacherRow> rows;
  rows.reserve(args.segments.size());
  ProbeConstants constants(args.counts);
  bool ordered = false;
  for (const Segment& s : args.segments) {
    if (s.numel == 0) continue;
    const Geometry geometry = Tiler::of<T>().ordered(s.numel, 1, s.period, s.stride);
    const bool aligned = geometry.takes_vectors(Traits<T>::kVector) && is_aligned(arguments.z + s.offset);
    rows.push_back({geometry, s.offset, probe_row(s), 0, constants.index_of(s), aligned});
    ordered |= geometry.layout != Layout::kFlat;
  }
  if (ordered) {
    launch_rows<RademacherBody<T, Order::kAny>>(device, arguments, rows, constants.get());
  } else {
    launch_rows<RademacherBody<T, Order::kFlat>>(device, arguments, rows, constants.get());
  }
}

}  // namespace adahessian::gpu
