// The cut of segments into tiles, which the CPU ops share: a tile is a range of logical elements of one parameter, its
// scratch stays in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../launch.h"

namespace adahessian::cpu {

constexpr int64_t kTile = 4096;   // elements; the scratch of a tile of floats fits into the L1 cache
constexpr int64_t kGrain = 2;     // tiles a thread takes at least
constexpr int64_t kPadding = 64;  // elements that vector code may run past the end of a tile's scratch

struct Tile {
  const Segment* segment;
  int64_t index;  // among the segment's tiles
  int64_t begin, end;
  ADAHESSIAN_MEMBER int64_t size() const { return end - begin; }
};

// Averaging blocks never straddle tiles unless they are longer than a tile; then tiles never straddle blocks.
struct SegmentTiling {
  int64_t span, length, per_span;

  explicit SegmentTiling(const Segment& s) {
    const bool is_long = s.block > kTile;
    span = is_long ? s.block : std::max<int64_t>(s.numel, 1);
    // Whole averaging blocks and, where that fits, whole vectors.
    const int64_t unit = std::lcm(s.block, int64_t{16});
    length = is_long ? kTile : kTile / (unit <= kTile ? unit : s.block) * (unit <= kTile ? unit : s.block);
    per_span = (span + length - 1) / length;
  }
  int64_t count(const Segment& s) const { return s.numel / span * per_span + (s.numel % span + length - 1) / length; }
  ADAHESSIAN_MEMBER Tile tile(const Segment& s, int64_t index) const {
    const int64_t first = index / per_span * span;
    const int64_t begin = first + index % per_span * length;
    return {&s, index, begin, std::min(std::min(begin + length, first + span), s.numel)};
  }
};

// Neighbouring tiles of one segment.
struct Run {
  const Segment* segment;
  SegmentTiling tiling;
  int64_t begin, end;
  ADAHESSIAN_MEMBER Tile tile(int64_t index) const { return tiling.tile(*segment, index); }
};

// All tiles of all segments, numbered through.
class Tiling {
 public:
  explicit Tiling(const std::vector<Segment>& segments) : segments_(segments) {
    first_.reserve(segments.size() + 1);
    tilings_.reserve(segments.size());
    first_.push_back(0);
    for (const Segment& s : segments) {
      tilings_.emplace_back(s);
      first_.push_back(first_.back() + tilings_.back().count(s));
    }
  }

  int64_t first(size_t segment) const { return first_[segment]; }
  int64_t count() const { return first_.back(); }

  // Calls body(run of tiles, segment number) on the thread pool until all tiles are done.
  template <typename Body>
  void for_each_run(const Context& context, const Body& body) const {
    context.parallel_for(0, count(), kGrain, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t t = begin; t < end; ++i) {
        const int64_t last = std::min(end, first_[i + 1]);
        if (t < last) body(Run{&segments_[i], tilings_[i], t - first_[i], last - first_[i]}, i);
        t = last;
      }
    });
  }
  // Calls body(tile, segment number) for every tile.
  template <typename Body>
  void for_each_tile(const Context& context, const Body& body) const {
    for_each_run(context, [&](const Run& run, size_t i) {
      for (int64_t t = run.begin; t < run.end; ++t) body(run.tile(t), i);
    });
  }

 private:
  const std::vector<Segment>& segments_;
  std::vector<SegmentTiling> tilings_;
  std::vector<int64_t> first_;
};

inline ProbeKey probe_key(const Probe& probe, const Segment& s, const Counts& counts) {
  return {probe.seed, s.param_id, uint32_t(counts.steps[2 * s.slot + 1]), probe.sample};
}

// Cuts a range of logical elements into strips that are contiguous in storage and calls
// body(first element of the strip counted from `begin`, its logical step, first storage index, length).
template <typename Body>
ADAHESSIAN_HD void for_each_strip(const Segment& s, int64_t begin, int64_t end, const Body& body) {
  if (s.period == 1) {
    body(0, 1, begin, end - begin);
    return;
  }
  const int64_t matrix = s.period * s.stride;
  for (int64_t origin = begin / matrix * matrix; origin < end; origin += matrix) {
    const int64_t low = std::max(begin - origin, int64_t{0}), high = std::min(end - origin, matrix);
    for (int64_t k = 0; k < s.period; ++k) {
      // Logical elements i * period + k of this matrix inside [low, high).
      const int64_t first = (std::max(low - k, int64_t{0}) + s.period - 1) / s.period;
      const int64_t last = (std::max(high - k, int64_t{0}) + s.period - 1) / s.period;
      if (first < last) {
        body(origin + first * s.period + k - begin, s.period, origin + k * s.stride + first, last - first);
      }
    }
  }
}

inline bool has_long_blocks(const Segment& s) { return s.block > kTile; }

// Whether adahessian_step sums each long block right before it updates it, from a cache the block fits into. A block
// that two threads share is summed by both: only where there are many more blocks than that.
inline bool sums_on_the_way(const Segment& s) {
  constexpr int64_t kCached = 65536, kMany = 64;
  return has_long_blocks(s) && s.block <= kCached && s.numel / s.block >= kMany && s.period == 1;
}

}  // namespace adahessian::cpu
