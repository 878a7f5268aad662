// Means of averaging blocks that are longer than a tile: a pass over Hz on its own, so that the ops that follow find
// them ready and need not read Hz again.
#include "tile.h"

namespace adahessian::cpu {
namespace {

template <typename T>
ADAHESSIAN_HD double sum_tile(const Tile& tile, const Probe& probe, const ProbeKey& key, const T*) {
  StateOf<T> d[kTile + kPadding];
  tile_d<T>(tile, probe, key, d);
  return double(sum_of(d, tile.size()));
}

#define ADAHESSIAN_SUM_TILE(T)                                                                             \
  ADAHESSIAN_CLONES double run(const Tile& tile, const Probe& probe, const ProbeKey& key, const T* type) { \
    return sum_tile(tile, probe, key, type);                                                               \
  }
ADAHESSIAN_SUM_TILE(float)
ADAHESSIAN_SUM_TILE(double)
ADAHESSIAN_SUM_TILE(bfloat16)
ADAHESSIAN_SUM_TILE(float16)

}  // namespace

template <typename S>
std::vector<std::vector<S>> long_block_means(Dtype dtype, const std::vector<Segment>& segments, const Tiling& tiling,
                                             const Probe& probe, const Counts& counts, const Context& context) {
  std::vector<std::vector<S>> means(segments.size());
  std::vector<double> partial(tiling.count());
  dispatch(dtype, [&](auto type) {
    tiling.run(context, [&](const Tile& tile, size_t i) {
      if (segments[i].block <= kTile || segments[i].hessian == nullptr) return;
      partial[tiling.first(i) + tile.index] = run(tile, probe, probe_key(probe, segments[i], counts), &type);
    });
  });
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    if (s.block <= kTile) continue;
    const int64_t per_block = SegmentTiling(s).per_span;
    for (int64_t begin = 0, t = tiling.first(i); begin < s.numel; begin += s.block) {
      const int64_t end = std::min(t + per_block, tiling.first(i + 1));
      double sum = 0;
      for (; t < end; ++t) sum += partial[t];
      means[i].push_back(S(sum / double(std::min(s.block, s.numel - begin))));
    }
  }
  return means;
}

template std::vector<std::vector<float>> long_block_means(Dtype, const std::vector<Segment>&, const Tiling&,
                                                          const Probe&, const Counts&, const Context&);
template std::vector<std::vector<double>> long_block_means(Dtype, const std::vector<Segment>&, const Tiling&,
                                                           const Probe&, const Counts&, const Context&);

}  // namespace adahessian::cpu
