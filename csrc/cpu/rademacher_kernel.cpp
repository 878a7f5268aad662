// z of a tile.
#include "block_mean.h"
#include "kernels.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

template <typename T>
void rademacher(const Tile& tile, const ProbeKey& key, T* z) {
  using S = StateOf<T>;
  SignBits signs;
  signs.draw(key, tile.begin, tile.size());
  for_each_strip(*tile.segment, tile.begin, tile.end,
                 [&](int64_t first, int64_t step, int64_t stored, int64_t size) ADAHESSIAN_INLINE_LAMBDA {
                   int64_t n = 0;
                   if (step == 1) {
                     const Vector<S> one = broadcast<S>(1);
                     for (; n + kLanes<S> <= size; n += kLanes<S>)
                       store_as_vector(z + stored + n, flip_signs<S>(one, signs.from(n)));
                   }
                   for (; n < size; ++n) store_to(z[stored + n], signs.from(first + n * step) & 1 ? S(-1) : S(1));
                 });
}

template void rademacher(const Tile&, const ProbeKey&, float*);
template void rademacher(const Tile&, const ProbeKey&, double*);
template void rademacher(const Tile&, const ProbeKey&, bfloat16*);
template void rademacher(const Tile&, const ProbeKey&, float16*);

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
