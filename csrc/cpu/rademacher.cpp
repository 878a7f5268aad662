// rademacher on the CPU: the probe z of every segment, +1 or -1, in storage order.
#include "tile.h"

namespace adahessian::cpu {
namespace {

template <typename T>
ADAHESSIAN_HD void write_tile(const Tile& tile, const ProbeKey& key, T* z) {
  SignScratch scratch;
  const uint32_t* signs = draw_signs(key, tile.begin, tile.size(), scratch);
  for_each_strip(*tile.segment, tile.begin, tile.end,
                 [&](int64_t first, int64_t step, int64_t stored, int64_t size) ADAHESSIAN_INLINE_LAMBDA {
                   for (int64_t n = 0; n < size; ++n) {
                     store_to(z[stored + n], flip_sign(StateOf<T>(1), signs[step == 1 ? n : first + n * step]));
                   }
                 });
}

ADAHESSIAN_CLONES void run_tile(const Tile& tile, const ProbeKey& key, float* z) { write_tile(tile, key, z); }
ADAHESSIAN_CLONES void run_tile(const Tile& tile, const ProbeKey& key, double* z) { write_tile(tile, key, z); }
ADAHESSIAN_CLONES void run_tile(const Tile& tile, const ProbeKey& key, bfloat16* z) { write_tile(tile, key, z); }
ADAHESSIAN_CLONES void run_tile(const Tile& tile, const ProbeKey& key, float16* z) { write_tile(tile, key, z); }

}  // namespace

void rademacher(const RademacherArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const Tiling tiling(args.segments);
    tiling.run(context, [&](const Tile& tile, size_t) {
      const Segment& s = *tile.segment;
      run_tile(tile, probe_key(args.probe, s, args.counts), static_cast<T*>(args.z) + s.offset);
    });
  });
}

}  // namespace adahessian::cpu
