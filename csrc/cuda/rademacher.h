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
  static constexpr int kTimes = 4;  // the tile of others: nothing is read, and what precedes the first store counts
  static constexpr int kSlots = kTimes * Traits<T>::kSlots;
  static constexpr int kTile = kTimes * Traits<T>::kTile;
  static_assert(kTile <= kMaxDivisor, "a tile passes the end of a longer row once");
  struct Shared {
    RademacherRow row;
    ProbeConstant constant;
    Tile tile;
    Signs<kTile> signs;
  };
  struct Thread {};
  static constexpr int kBlocksPerSm = kOrder == Order::kFlat ? 6 : 5;
};

// +1, and -1 where a bit is set: the bits of 1 with the sign bit put in, 16-bit numbers two at a time.
template <typename T, int n>
ADAHESSIAN_HD Vec<T, n> signed_ones(uint32_t negative) {
  Vec<T, n> z = {};
  if constexpr (sizeof(T) == 2) {
    constexpr uint32_t kOnes = std::is_same_v<T, bfloat16> ? 0x3F803F80u : 0x3C003C00u;
    ADAHESSIAN_UNROLL
    for (int w = 0; w < n / 2; ++w) {
      z.word[w] = kOnes | (negative << (15 - 2 * w) & 0x8000u) | (negative << (30 - 2 * w) & 0x80000000u);
    }
  } else {
    ADAHESSIAN_UNROLL
    for (int e = 0; e < n; ++e) {
      if constexpr (sizeof(T) == 4) {
        set(z, e, bit_cast<T>(0x3F800000u | (negative << (31 - e) & 0x80000000u)));
      } else {
        set(z, e, T(negative >> e & 1 ? -1 : 1));
      }
    }
  }
  return z;
}

template <typename T, Order kOrder>
ADAHESSIAN_HD void write_probe(const RademacherArguments<T>& arguments,
                               typename RademacherBody<T, kOrder>::Shared& shared, int thread) {
  constexpr int kVector = Traits<T>::kVector, kApart = kThreads * kVector;
  T* z = arguments.z + shared.row.offset;
  // In a whole tile the slots of a thread are as far apart as their signs, whole words.
  if (kOrder == Order::kFlat && shared.row.aligned && shared.tile.count == RademacherBody<T, kOrder>::kTile) {
    const uint32_t bit = uint32_t(shared.tile.begin % kSignsPerCall) + uint32_t(thread * kVector);
    z += shared.tile.begin + thread * kVector;
    ADAHESSIAN_UNROLL
    for (int i = 0; i < RademacherBody<T, kOrder>::kSlots; ++i) {
      const uint32_t negative = at(shared.signs.word, int(bit / 32) + i * (kApart / 32)) >> (bit % 32);
      store_aligned(z + i * kApart, signed_ones<T, kVector>(negative));
    }
    return;
  }
  ADAHESSIAN_UNROLL
  for (int i = 0; i < RademacherBody<T, kOrder>::kSlots; ++i) {
    const Slot slot = slot_of<kVector, kOrder>(shared.tile, thread + i * kThreads);
    const uint32_t negative = negative_signs<kVector, kOrder>(shared.signs, shared.tile, slot);
    store<kOrder>(z, signed_ones<T, kVector>(negative), shared.tile, slot, shared.row.aligned);
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
    const Geometry geometry =
        Tiler::of<T>(RademacherBody<T, Order::kAny>::kTimes).ordered(s.numel, 1, s.period, s.stride);
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
