// The parameters of a tile, moved along z or put back.
#include "block_mean.h"
#include "kernels.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

template <typename T>
void perturb(const Tile& tile, const PerturbWork<T>& work) {
  using S = StateOf<T>;
  SignBits signs;
  if (work.scale != 0) signs.draw(work.key, tile.begin, tile.size());
  for_each_strip(*tile.segment, tile.begin, tile.end,
                 [&](int64_t first, int64_t step, int64_t stored, int64_t size) ADAHESSIAN_INLINE_LAMBDA {
                   T* param = work.param + stored;
                   T* saved = work.saved + stored;
                   if (work.save) memcpy(saved, param, size * sizeof(T));
                   if (work.scale == 0) {
                     memcpy(param, saved, size * sizeof(T));
                     return;
                   }
                   int64_t n = 0;
                   if (step == 1) {
                     const Vector<S> scale = broadcast<S>(work.scale);
                     for (; n + kLanes<S> <= size; n += kLanes<S>)
                       store_as_vector(param + n, load_as_vector(saved + n) + flip_signs<S>(scale, signs.from(n)));
                   }
                   for (; n < size; ++n) {
                     const S move = signs.from(first + n * step) & 1 ? -work.scale : work.scale;
                     store_to(param[n], load_as(saved[n]) + move);
                   }
                 });
}

template void perturb(const Tile&, const PerturbWork<float>&);
template void perturb(const Tile&, const PerturbWork<double>&);
template void perturb(const Tile&, const PerturbWork<bfloat16>&);
template void perturb(const Tile&, const PerturbWork<float16>&);

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
