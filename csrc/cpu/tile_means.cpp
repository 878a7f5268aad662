// The loops that sum the averaging blocks of a tile.
#include "tile_means.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

// In four parts side by side: a core reads
// several streams faster than one. As many elements behind them, the next to be summed, are fetched meanwhile.
template <typename T>
double sum_of(D<T> d, int64_t begin, int64_t end) {
  using S = StateOf<T>;
  constexpr int64_t W = kLanes<S>;
  const int64_t part = (end - begin) / (4 * W) * W;
  Vector<S> sums[4] = {};
  for (int64_t i = begin; i < begin + part; i += W) {
    ADAHESSIAN_UNROLL
    for (int k = 0; k < 4; ++k) {
      d.fetch(i + k * part + end - begin);
      sums[k] += d.whole_vector(i + k * part);
    }
  }
  for (int64_t i = begin + 4 * part; i < end; i += W) {
    sums[0] += where<S>(lane_numbers<S>() < Signed<S>(end - i), d.vector(i));
  }
  const Vector<S> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int l = 0; l < W; ++l) total += double(all[l]);
  return total;
}

template <typename T>
double sum_tile(const Tile& tile, const Probe& probe, const ProbeKey& key) {
  double sum = 0;
  with_d<T>(tile, probe, key, [&](const auto& d) { sum = sum_of(d, 0, d.size()); });
  return sum;
}

template <int block, typename T>
[[gnu::noinline]] void spread_short_blocks(D<T> d, StateOf<T>* ds) {
  ShortBlocksOf<block, T> blocks(d);
  for (int64_t i = 0; i < d.size(); i += kLanes<StateOf<T>>) store_vector(ds + i, blocks.next(i));
}

template <typename T>
void spread_short_blocks(D<T> d, int64_t block, StateOf<T>* ds) {
  for_short_block<StateOf<T>>(block, [&](auto b) { spread_short_blocks<b>(d, ds); });
}

template <typename T>
void average_blocks(D<T> d, int64_t block, StateOf<T>* means) {
  if (is_wide(block)) {
    for (int64_t begin = 0; begin < d.size(); begin += block) {
      const int64_t end = std::min(begin + block, d.size());
      *means++ = StateOf<T>(sum_of(d, begin, end) / double(end - begin));
    }
    return;
  }
  Vector<StateOf<T>> rows[BlockSums<StateOf<T>>::kRows];
  BlockWalk<StateOf<T>> walk(block);
  BlockSums<StateOf<T>> sums(rows);
  for (int64_t i = 0; i < d.size(); i += kLanes<StateOf<T>>) sums.push(d.vector(i), walk.next());
  sums.end(d.size(), block, means);
}

#define ADAHESSIAN_FOR_TYPE(T)                                             \
  template double sum_of(D<T>, int64_t, int64_t);                          \
  template double sum_tile<T>(const Tile&, const Probe&, const ProbeKey&); \
  template void spread_short_blocks(D<T>, int64_t, StateOf<T>*);           \
  template void average_blocks(D<T>, int64_t, StateOf<T>*);
ADAHESSIAN_FOR_TYPE(float)
ADAHESSIAN_FOR_TYPE(double)
ADAHESSIAN_FOR_TYPE(bfloat16)
ADAHESSIAN_FOR_TYPE(float16)

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
