// D of a tile and the means of its averaging blocks (Eq. 6 and 7), for the kernels.
#pragma once

#include "block_mean.h"
#include "tile.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

// The probe of a tile. |z * Hz| = |Hz|: no signs for absolute values.
ADAHESSIAN_HD void draw(const Tile& tile, const Probe& probe, const ProbeKey& key, SignBits& signs) {
  probe.is_hvp && !tile.segment->absolute ? signs.draw(key, tile.begin, tile.size()) : signs.clear();
}

// D of a tile whose elements are stored in logical order.
template <typename T>
ADAHESSIAN_HD D<T> stored_d(const Tile& tile, const SignBits& signs) {
  const Segment& s = *tile.segment;
  return {static_cast<const T*>(s.hessian) + tile.begin, signs, tile.size(), s.absolute};
}

// Calls body(D of the tile), gathering it first where it is stored in another order.
template <typename T, typename Body>
ADAHESSIAN_HD void with_d(const Tile& tile, const Probe& probe, const ProbeKey& key, const Body& body) {
  using S = StateOf<T>;
  const Segment& s = *tile.segment;
  SignBits signs;
  draw(tile, probe, key, signs);
  if (s.period == 1) return body(stored_d<T>(tile, signs));
  S logical[kTile];
  for_each_strip(s, tile.begin, tile.end,
                 [&](int64_t first, int64_t step, int64_t stored, int64_t size) ADAHESSIAN_INLINE_LAMBDA {
                   const T* hessian = static_cast<const T*>(s.hessian) + stored;
                   for (int64_t n = 0; n < size; ++n) logical[first + n * step] = load_as(hessian[n]);
                 });
  body(D<S>(logical, signs, tile.size(), s.absolute));
}

template <typename S>
constexpr int64_t kShortBlock = kLanes<S>;  // a vector

// Calls body(std::integral_constant<int, block>) for a block of 2 ... kShortBlock elements.
template <typename S, typename Body>
ADAHESSIAN_HD void for_short_block(int64_t block, const Body& body) {
  [&]<int... b>(std::integer_sequence<int, b...>) {
    ((b + 2 == block ? body(std::integral_constant<int, b + 2>()) : void()), ...);
  }(std::make_integer_sequence<int, kShortBlock<S> - 1>());
}

// Means of short blocks, vector by vector, for a loop that begins at element 0 of a tile.
template <int block, typename T>
class ShortBlocksOf {
  using S = StateOf<T>;
  static constexpr int64_t W = kLanes<S>, kAhead = ShortBlocks<S, block>::kDelay * W;

 public:
  ADAHESSIAN_MEMBER explicit ShortBlocksOf(const D<T>& d) : d_(d), blocks_(d.size()) {
    for (int64_t i = 0; i < kAhead; i += W) blocks_.push(d_.vector(i));
  }
  // Ds of elements i ... i + W - 1.
  ADAHESSIAN_MEMBER Vector<S> next(int64_t i) { return blocks_.push(d_.vector(i + kAhead)); }

 private:
  D<T> d_;
  ShortBlocks<S, block> blocks_;
};

constexpr int64_t kWideBlock = 1024;

// Whether blocks are summed one by one.
inline bool is_wide(int64_t block) { return block >= kWideBlock && block % 8 == 0; }

// Sum of elements begin ... end - 1 of a tile, begin being a multiple of 8.
template <typename T>
double sum_of(D<T> d, int64_t begin, int64_t end);

// Sum of D over a tile.
template <typename T>
double sum_tile(const Tile& tile, const Probe& probe, const ProbeKey& key);

// The mean of each element's block; blocks are short. Writes up to a vector past the tile's last element.
template <typename T>
void spread_short_blocks(D<T> d, int64_t block, StateOf<T>* ds);

// The mean of every block of a tile; blocks are longer than a vector.
template <typename T>
void average_blocks(D<T> d, int64_t block, StateOf<T>* means);

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
