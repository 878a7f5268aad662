// hessian_diag on the CPU: the block-averaged diagonal Ds (Eq. 6, 7) into the compact buffer.
#include "tile.h"

namespace adahessian::cpu {
namespace {

// What a tile needs besides itself.
template <typename T>
struct Work {
  Probe probe;
  ProbeKey key;
  StateOf<T>* diag;  // of the segment
  StateOf<T> scale;
  bool accumulate;
};

template <typename S>
ADAHESSIAN_HD void write_means(const S* means, int64_t count, S scale, bool accumulate, S* out) {
  if (accumulate) {
    for (int64_t i = 0; i < count; ++i) out[i] += scale * means[i];
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = scale * means[i];
  }
}

template <typename T>
ADAHESSIAN_HD void average_tile(const Tile& tile, const Work<T>& work) {
  using S = StateOf<T>;
  const int64_t block = tile.segment->block;
  S d[kTile + kPadding], means[kTile + kPadding];
  tile_d<T>(tile, work.probe, work.key, d);
  if (block > 1) block_means(d, tile.size(), block, means);
  const int64_t count = (tile.size() + block - 1) / block;
  write_means(block > 1 ? means : d, count, work.scale, work.accumulate, work.diag + tile.begin / block);
}

ADAHESSIAN_CLONES void run_average(const Tile& tile, const Work<float>& work) { average_tile(tile, work); }
ADAHESSIAN_CLONES void run_average(const Tile& tile, const Work<double>& work) { average_tile(tile, work); }
ADAHESSIAN_CLONES void run_average(const Tile& tile, const Work<bfloat16>& work) { average_tile(tile, work); }
ADAHESSIAN_CLONES void run_average(const Tile& tile, const Work<float16>& work) { average_tile(tile, work); }

}  // namespace

void hessian_diag(const HessianDiagArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using S = StateOf<T>;
    const Tiling tiling(args.segments);
    const auto work = [&](const Segment& s) {
      return Work<T>{args.probe, probe_key(args.probe, s, args.counts), static_cast<S*>(args.diag) + s.diag_offset,
                     S(args.scale), args.accumulate};
    };
    tiling.run(context, [&](const Tile& tile, size_t) {
      if (tile.segment->block <= kTile) run_average(tile, work(*tile.segment));
    });
    if (!any_long_block(args.segments)) return;
    const auto means = long_block_means<S>(args.dtype, args.segments, tiling, args.probe, args.counts, context);
    for (size_t i = 0; i < means.size(); ++i) {
      const Work<T> w = work(args.segments[i]);
      write_means(means[i].data(), int64_t(means[i].size()), w.scale, w.accumulate, w.diag);
    }
  });
}

}  // namespace adahessian::cpu
