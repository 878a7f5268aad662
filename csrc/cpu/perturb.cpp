// perturb on the CPU: the parameters of every segment moved along the probe, saved + scale * z, or put back.
#include "kernels.h"
#include "tile.h"

namespace adahessian::cpu {

void perturb(const PerturbArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const Tiling tiling(args.segments);
    tiling.for_each_tile(context, [&](const Tile& tile, size_t) {
      const Segment& s = *tile.segment;
      kernels<T>().perturb(tile, {probe_key(args.probe, s, args.counts), static_cast<T*>(s.param),
                                  static_cast<T*>(args.saved) + s.offset, StateOf<T>(args.scale), args.save});
    });
  });
}

}  // namespace adahessian::cpu
