// hessian_diag on the CPU: the block-averaged diagonal Ds (Eq. 6, 7) into the compact buffer.
#include "kernels.h"
#include "long_blocks.h"
#include "tile.h"

namespace adahessian::cpu {

void hessian_diag(const HessianDiagArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using S = StateOf<T>;
    const Tiling tiling(args.segments);
    const auto work = [&](const Segment& s) {
      return AverageWork<T>{args.probe, probe_key(args.probe, s, args.counts),
                            static_cast<S*>(args.diag) + s.diag_offset, S(args.scale), args.accumulate};
    };
    tiling.for_each_tile(context, [&](const Tile& tile, size_t) {
      if (tile.segment->block <= kTile) kernels<T>().hessian_diag(tile, work(*tile.segment));
    });
    const auto means = long_block_means<T>(args.segments, tiling, args.probe, args.counts, context, has_long_blocks);
    for (size_t i = 0; i < means.size(); ++i) {
      const AverageWork<T> w = work(args.segments[i]);
      write_means(means[i].data(), int64_t(means[i].size()), w.scale, w.accumulate, w.diag);
    }
  });
}

}  // namespace adahessian::cpu
