// Device side: the Rademacher probe of a tile, drawn once into shared memory, 128 signs a Philox call.
#pragma once

#include "../launch.h"
#include "table.h"
#include "tile.h"

namespace adahessian::gpu {

// What a row of a table says about the probe.
struct ProbeRow {
  uint32_t param_id;
  uint32_t slot;  // row of the step counts, if they are on the device
};

// What changes from step to step, if the step counts are on the host.
struct ProbeConstant {
  uint32_t hessian_step;
};

// What all rows have in common. `steps` is null if the step counts are on the host.
struct ProbeSource {
  uint64_t seed;
  const int64_t* steps;
  uint32_t sample;
  bool is_hvp;
};

inline ProbeRow probe_row(const Segment& s) { return {s.param_id, uint32_t(s.slot)}; }

inline ProbeSource probe_source(const Probe& probe, const Counts& counts) {
  return {probe.seed, counts.on_device ? counts.steps : nullptr, probe.sample, probe.is_hvp};
}

// The constants of a table whose rows differ in nothing but their number of Hessian steps.
class ProbeConstants {
 public:
  explicit ProbeConstants(const Counts& counts) : counts_(counts) {}

  uint32_t index_of(const Segment& s) {
    const uint32_t hessian_step = counts_.on_device ? 0 : uint32_t(counts_.steps[2 * s.slot + 1]);
    return constants_.index_of(hessian_step, [&] { return ProbeConstant{hessian_step}; });
  }
  const std::vector<ProbeConstant>& get() const { return constants_.get(); }

 private:
  Counts counts_;
  DistinctConstants<uint32_t, ProbeConstant> constants_;
};

template <int kTile>
struct Signs {
  static constexpr int kMaxCalls = kTile / kSignsPerCall + 2;
  SharedArray<uint32_t, 4 * kMaxCalls> word;
};

// Every thread draws at most one call.
template <int kTile>
ADAHESSIAN_HD void draw_signs(Signs<kTile>& signs, const ProbeSource& source, const ProbeRow& row,
                              const ProbeConstant& constant, const Tile& t, int thread) {
  const int64_t first = t.begin / kSignsPerCall;
  if (thread > int((t.begin + t.count - 1) / kSignsPerCall - first)) return;
  const uint32_t hessian_step = source.steps ? uint32_t(source.steps[2 * row.slot + 1]) : constant.hessian_step;
  const ProbeKey key = {source.seed, row.param_id, hessian_step, source.sample};
  const PhiloxWords drawn = rademacher_words(key, uint32_t(first + thread));
  ADAHESSIAN_UNROLL
  for (int w = 0; w < 4; ++w) at(signs.word, 4 * thread + w) = drawn.word[w];
}

// Bit e is set where z is -1 at element e of the slot.
template <int kVector, Order kOrder, int kTile>
ADAHESSIAN_HD uint32_t negative_signs(const Signs<kTile>& signs, const Tile& t, const Slot& s) {
  if (s.high <= s.low) return 0;
  const int shift = int(t.begin % kSignsPerCall);
  if (kOrder == Order::kFlat || t.layout == Layout::kFlat) {
    // Vectors begin at multiples of their length: all signs are in one word.
    const uint32_t bit = uint32_t(shift + s.local);
    return at(signs.word, int(bit / 32)) >> (bit % 32);
  }
  uint32_t mask = 0;
  ADAHESSIAN_UNROLL
  for (int e = 0; e < kVector; ++e) {
    const uint32_t bit = uint32_t(shift) + logical_index<kOrder>(t, s, e);
    mask |= (at(signs.word, int(bit / 32)) >> (bit % 32) & 1u) << e;
  }
  return mask;
}

}  // namespace adahessian::gpu
