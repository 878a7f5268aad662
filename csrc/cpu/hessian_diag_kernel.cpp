// Means over averaging blocks that are no longer than a tile.
#include "kernels.h"
#include "tile_means.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

template <typename T>
void hessian_diag(const Tile& tile, const AverageWork<T>& work) {
  using S = StateOf<T>;
  const int64_t block = tile.segment->block, count = (tile.size() + block - 1) / block;
  S means[kTile + kPadding];
  with_d<T>(tile, work.probe, work.key, [&](const auto& d) {
    if (block > kShortBlock<S>) {
      average_blocks(d, block, means);
    } else if (block > 1) {
      spread_short_blocks(d, block, means);
      for (int64_t k = 1; k < count; ++k) means[k] = means[k * block];
    } else {
      for (int64_t i = 0; i < d.size(); i += kLanes<S>) store_vector(means + i, d.vector(i));
    }
  });
  write_means(means, count, work.scale, work.accumulate, work.diag + tile.begin / block);
}

template void hessian_diag(const Tile&, const AverageWork<float>&);
template void hessian_diag(const Tile&, const AverageWork<double>&);
template void hessian_diag(const Tile&, const AverageWork<bfloat16>&);
template void hessian_diag(const Tile&, const AverageWork<float16>&);

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
