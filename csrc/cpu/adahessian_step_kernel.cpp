// adahessian_step on a run of tiles (Eq. 6-9); compiled once for each pair of types of parameters
// and states, ADAHESSIAN_STEP.
#include "kernels.h"
#include "tile_means.h"
#include "update_range.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {
namespace {

// Ds in an array, in storage order: Hz itself, or numbers of the states' type.
template <typename T, typename M, typename Element>
[[gnu::noinline]] void update_from(const StepWork<T, M>& work, int64_t begin, int64_t size, const Element* ds) {
  constexpr int64_t W = kLanes<StateOf<T>>;
  update<true>(work, begin, size, [&](int64_t i) ADAHESSIAN_INLINE_LAMBDA {
    if (i + W <= size) return load_as_vector(ds + i);
    Element last[W] = {};
    std::copy_n(ds + i, size - i, last);
    return load_as_vector(last);
  });
}

// Sums blocks and updates in one loop, in the case that matters: there is such a loop for each block length.
template <typename T, typename M>
constexpr bool kSumsShortBlocks = std::is_same_v<M, StateOf<T>>;

template <typename T, typename M>
bool sums_short_blocks(const StepWork<T, M>& work) {
  return kSumsShortBlocks<T, M> && is_plain(work.c) && work.master == nullptr;
}

template <int block, typename T, typename M>
[[gnu::noinline]] void update_short_blocks(const StepWork<T, M>& work, int64_t begin, D<T> d) {
  ShortBlocksOf<block, T> blocks(d);
  update_range<true, true, false>(work, begin, d.size(),
                                  [&](int64_t i) ADAHESSIAN_INLINE_LAMBDA { return blocks.next(i); });
}

template <typename T, typename M>
void update_short_blocks(const Run& run, const StepWork<T, M>& work) {
  SignBits signs;
  for (int64_t t = run.begin; t < run.end; ++t) {
    const Tile tile = run.tile(t);
    draw(tile, work.probe, work.key, signs);
    for_short_block<StateOf<T>>(run.segment->block, [&](auto block) {
      if constexpr (kSumsShortBlocks<T, M>) update_short_blocks<block>(work, tile.begin, stored_d<T>(tile, signs));
    });
  }
}

// While a tile is updated, the blocks of the next one are summed.
template <typename T, typename M>
[[gnu::noinline]] void update_blocks(const Run& run, const StepWork<T, M>& work) {
  using S = StateOf<T>;
  const int64_t block = run.segment->block;
  SignBits signs;
  Vector<S> rows[BlockSums<S>::kRows];
  S means[kTile / kLanes<S> + kPadding];
  Tile tile = run.tile(run.begin);
  draw(tile, work.probe, work.key, signs);
  average_blocks(stored_d<T>(tile, signs), block, means);
  for (int64_t t = run.begin + 1; t < run.end; ++t) {
    const Tile next = run.tile(t);
    draw(next, work.probe, work.key, signs);
    const D<T> d = stored_d<T>(next, signs);
    BlockWalk<S> walk(block);  // in this tile and in the next one
    BlockSums<S> sums(rows);
    SpreadMeans<S> spread(means);
    update<true>(work, tile.begin, tile.size(), [&](int64_t i) ADAHESSIAN_INLINE_LAMBDA {
      const InBlock<S> in = walk.next();
      const Vector<S> ds = spread.next(in);
      sums.push(d.vector(i), in);
      return ds;
    });
    sums.end(next.size(), block, means);
    tile = next;
  }
  BlockWalk<S> walk(block);
  SpreadMeans<S> spread(means);
  update<true>(work, tile.begin, tile.size(),
               [&](int64_t) ADAHESSIAN_INLINE_LAMBDA { return spread.next(walk.next()); });
}

// A block whose mean is known; Hz from `ahead` on, which is summed next, is fetched meanwhile.
template <typename T, typename M>
ADAHESSIAN_HD void update_block(const StepWork<T, M>& work, int64_t begin, int64_t size, StateOf<T> mean,
                                const T* ahead) {
  update<true>(work, begin, size, [&](int64_t i) ADAHESSIAN_INLINE_LAMBDA {
    __builtin_prefetch(ahead + i, 0, 2);
    return broadcast<StateOf<T>>(mean);
  });
}

// The means of a tile's blocks and then the blocks.
template <typename T, typename M>
[[gnu::noinline]] void update_wide_blocks(const Run& run, const StepWork<T, M>& work) {
  using S = StateOf<T>;
  const Segment& s = *run.segment;
  const T* hessian = static_cast<const T*>(s.hessian);
  SignBits signs;
  S means[kTile / kWideBlock + 1];
  for (int64_t t = run.begin; t < run.end; ++t) {
    const Tile tile = run.tile(t);
    draw(tile, work.probe, work.key, signs);
    average_blocks(stored_d<T>(tile, signs), s.block, means);
    const S* mean = means;
    for (int64_t begin = tile.begin; begin < tile.end; begin += s.block) {
      const int64_t size = std::min(s.block, tile.end - begin);
      update_block(work, begin, size, *mean++, hessian + std::min(begin + tile.size(), s.numel - size));
    }
  }
}

// A block's mean and then its tiles.
template <typename T, typename M>
[[gnu::noinline]] void update_long_blocks(const Run& run, const StepWork<T, M>& work) {
  using S = StateOf<T>;
  const Segment& s = *run.segment;
  int64_t block = -1;
  S mean = 0;
  for (int64_t t = run.begin; t < run.end; ++t) {
    const Tile tile = run.tile(t);
    if (tile.begin / s.block != block) {
      block = tile.begin / s.block;
      double sum = 0;
      const int64_t first = block * run.tiling.per_span;
      for (int64_t k = first; k < std::min(first + run.tiling.per_span, run.tiling.count(s)); ++k) {
        sum += sum_tile<T>(run.tile(k), work.probe, work.key);
      }
      mean = long_block_mean<S>(s, block * s.block, sum);
    }
    const T* ahead = static_cast<const T*>(s.hessian) + std::min(tile.begin + s.block, s.numel - tile.size());
    update_block(work, tile.begin, tile.size(), mean, ahead);
  }
}

// Ds of every element of a tile, in logical order.
template <typename T, typename M>
ADAHESSIAN_HD void tile_ds(const Tile& tile, const StepWork<T, M>& work, StateOf<T>* ds) {
  using S = StateOf<T>;
  const Segment& s = *tile.segment;
  const int64_t first_block = tile.begin / s.block;
  if (s.block > kTile) {
    std::fill_n(ds, tile.size(), (work.diag ? work.diag : work.long_means)[first_block]);
    return;
  }
  S means[kTile / 2 + kPadding];
  if (work.diag != nullptr) {
    const int64_t count = (tile.size() + s.block - 1) / s.block;
    std::copy_n(work.diag + first_block, count, s.block == 1 ? ds : means);
    if (s.block == 1) return;
  } else {
    const bool is_short = s.block <= kShortBlock<S>;
    with_d<T>(tile, work.probe, work.key, [&](const auto& d) {
      if (!is_short) return average_blocks(d, s.block, means);
      spread_short_blocks(d, s.block, ds);
    });
    if (is_short) return;
  }
  if (s.block >= kLanes<S>) {
    BlockWalk<S> walk(s.block);
    SpreadMeans<S> spread(means);
    for (int64_t i = 0; i < tile.size(); i += kLanes<S>) store_vector(ds + i, spread.next(walk.next()));
  } else {
    for (int64_t i = 0; i < tile.size(); ++i) ds[i] = means[i / s.block];
  }
}

}  // namespace

template <typename T, typename M>
void adahessian_step(const Run& run, const StepWork<T, M>& work) {
  using S = StateOf<T>;
  const Segment& s = *run.segment;
  const int64_t begin = run.tile(run.begin).begin, end = run.tile(run.end - 1).end;
  if (!work.c.moves) return update_momentum(work, begin, end - begin);
  if (!work.has_curvature) {
    return update<false>(work, begin, end - begin, [](int64_t) ADAHESSIAN_INLINE_LAMBDA { return Vector<S>{}; });
  }
  if (work.diag == nullptr && s.block == 1) {
    // D^2 = Hz^2: neither probe nor order matters, so the range is taken in storage order.
    return update_from(work, begin, end - begin, static_cast<const T*>(s.hessian) + begin);
  }
  if (work.diag == nullptr && sums_on_the_way(s)) return update_long_blocks(run, work);
  if (work.diag == nullptr && s.period == 1 && s.block <= kTile) {
    if (is_wide(s.block)) return update_wide_blocks(run, work);
    if (s.block > kShortBlock<S>) return update_blocks(run, work);
    if (sums_short_blocks(work)) return update_short_blocks(run, work);
  }
  S ds[kTile + kPadding], in_storage_order[kTile];
  for (int64_t t = run.begin; t < run.end; ++t) {
    const Tile tile = run.tile(t);
    tile_ds(tile, work, ds);
    for_each_strip(s, tile.begin, tile.end,
                   [&](int64_t first, int64_t step, int64_t stored, int64_t size) ADAHESSIAN_INLINE_LAMBDA {
                     if (step > 1) {
                       for (int64_t n = 0; n < size; ++n) in_storage_order[n] = ds[first + n * step];
                     }
                     update_from(work, stored, size, step > 1 ? in_storage_order : ds);
                   });
  }
}

template void adahessian_step(const Run&, const StepWork<ADAHESSIAN_STEP>&);

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
