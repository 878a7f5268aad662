// rademacher on the CPU: the probe z of every segment, +1 or -1, in storage order.
#include "kernels.h"
#include "tile.h"

namespace adahessian::cpu {

void rademacher(const RademacherArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const Tiling tiling(args.segments);
    tiling.for_each_tile(context, [&](const Tile& tile, size_t) {
      const Segment& s = *tile.segment;
      kernels<T>().rademacher(tile, probe_key(args.probe, s, args.counts), static_cast<T*>(args.z) + s.offset);
    });
  });
}

}  // namespace adahessian::cpu
