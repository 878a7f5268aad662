// Means of averaging blocks that are longer than a tile: a pass over Hz on its own, so that the ops that follow find
// them ready and need not read Hz again.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "tile.h"

namespace adahessian::cpu {

// A list of means for each segment; empty for segments that are not wanted. Every tile sums its part, the parts are
// added in order.
template <typename T, typename Wanted>
std::vector<std::vector<StateOf<T>>> long_block_means(const std::vector<Segment>& segments, const Tiling& tiling,
                                                      const Probe& probe, const Counts& counts, const Context& context,
                                                      const Wanted& wanted) {
  std::vector<std::vector<StateOf<T>>> means(segments.size());
  if (std::none_of(segments.begin(), segments.end(), wanted)) return means;
  std::vector<double> partial(tiling.count());
  tiling.for_each_tile(context, [&](const Tile& tile, size_t i) {
    if (!wanted(segments[i]) || segments[i].hessian == nullptr) return;
    partial[tiling.first(i) + tile.index] = kernels<T>().sum(tile, probe, probe_key(probe, segments[i], counts));
  });
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    if (!wanted(s)) continue;
    const int64_t per_block = SegmentTiling(s).per_span;
    for (int64_t begin = 0, t = tiling.first(i); begin < s.numel; begin += s.block) {
      const int64_t end = std::min(t + per_block, tiling.first(i + 1));
      double sum = 0;
      for (; t < end; ++t) sum += partial[t];
      means[i].push_back(long_block_mean<StateOf<T>>(s, begin, sum));
    }
  }
  return means;
}

}  // namespace adahessian::cpu
