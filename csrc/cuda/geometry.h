// Host side: how a parameter is cut into tiles, the ranges of logical elements that one thread block works on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../dtypes.h"

namespace adahessian::gpu {

constexpr int kThreads = 256;  // of a thread block

// A thread holds kSlots vectors of 128 bits, of 16-bit parameters or states if either are: enough bytes in flight, few
// enough registers. M is what the states are stored in.
template <typename T, typename M = StateOf<T>>
struct Traits {
  static constexpr int kVector = 16 / (sizeof(T) < sizeof(M) ? sizeof(T) : sizeof(M));
  static constexpr int kSlots = kVector == 8 ? 1 : 2;
  static constexpr int kTile = kThreads * kSlots * kVector;  // elements, all dtypes but double the same
};

// How a tile's logical range lies in memory. segments.py explains the (stride, period) matrices.
enum class Layout : int32_t {
  kFlat,      // storage order is logical order, or order does not matter
  kMatrices,  // whole matrices
  kStrips,    // rows of one matrix: `period` strips of storage
  kGather,    // any range; the place of every element is computed
};

struct Geometry {
  int64_t numel;
  int64_t block;  // averaging block; 0: each tile is one
  int64_t period, stride;
  int64_t span;  // tiles do not straddle its multiples
  uint32_t tiles_per_span;
  int32_t length;  // elements of a tile; the last tile of a span may be shorter. 0: the block does not fit
  int32_t unit;    // elements of a tile that are averaged together
  int32_t lanes;   // threads that share the sum of a unit; a power of two
  int32_t rows;    // kMatrices, kStrips: matrix rows in a tile
  Layout layout;

  // Whether whole slots can be one access each, if the array is aligned.
  bool takes_vectors(int64_t vector) const {
    return layout != Layout::kGather && (layout != Layout::kStrips || (stride % vector == 0 && rows % vector == 0));
  }

  int64_t n_tiles() const { return numel / span * tiles_per_span + (numel % span + length - 1) / length; }
};

// The tilings of one element type. Blocks are at most as long as the parameter.
class Tiler {
 public:
  template <typename T, typename M = StateOf<T>>
  static Tiler of(int times = 1) {
    return Tiler(times * Traits<T, M>::kTile, Traits<T, M>::kVector);
  }

  // For elementwise work.
  Geometry flat(int64_t numel) const { return flat(numel, 1); }

  // Tiles that hold whole averaging blocks, in logical order; length 0 if a block does not fit.
  Geometry ordered(int64_t numel, int64_t block, int64_t period, int64_t stride) const {
    if (period == 1 || stride == 1) return flat(numel, block);
    Geometry g = {numel,          block, period,          stride,           numel, 1, int32_t(numel),
                  int32_t(block), 1,     int32_t(stride), Layout::kMatrices};
    if (numel > tile_ && !fit_matrices(g) && !fit_strips(g)) {
      g.layout = Layout::kGather;
      g.length = int32_t(tile_ / block * block);
      g.span = g.length;
    }
    return with_lanes(g);
  }

  // Tiles that lie inside one long averaging block each.
  Geometry inside_blocks(int64_t numel, int64_t block, int64_t period, int64_t stride) const {
    const bool is_flat = period == 1 || stride == 1;
    Geometry g = ordered(numel, 1, period, stride);
    if (block < numel) {
      g.layout = is_flat ? Layout::kFlat : Layout::kGather;
      g.span = block;
      g.length = int32_t(is_flat && block % vector_ != 0 ? tile_ - vector_ : tile_);
      g.tiles_per_span = uint32_t((block + g.length - 1) / g.length);
    }
    g.block = block;
    return g;
  }

  // The same tiles, each one averaging block that takes all threads.
  static Geometry one_block_each(Geometry g) {
    g.block = 0;
    g.unit = g.length;
    g.lanes = kThreads;
    return g;
  }

 private:
  Tiler(int64_t tile, int64_t vector) : tile_(tile), vector_(vector) {}

  Geometry flat(int64_t numel, int64_t block) const {
    const int32_t length = int32_t(numel <= tile_ ? numel : longest_multiple(block));
    return with_lanes({numel, block, 1, 1, length, 1, length, int32_t(block), 1, 1, Layout::kFlat});
  }

  // Longest run of whole units that a tile holds. Tiles that begin at a vector are preferred, but not at any price:
  // otherwise a vector that two tiles share costs both of them a slot.
  int64_t longest_multiple(int64_t unit) const {
    const int64_t aligned_unit = std::lcm(unit, vector_);
    const int64_t aligned = tile_ / aligned_unit * aligned_unit;
    const int64_t anywhere = (tile_ - vector_ + 1) / unit * unit;
    return 4 * aligned >= 3 * anywhere ? aligned : anywhere;
  }

  bool fit_matrices(Geometry& g) const {
    const int64_t matrix = g.period * g.stride;
    g.length = matrix > tile_ || g.block > tile_ ? 0 : int32_t(longest_multiple(std::lcm(matrix, g.block)));
    g.span = g.length;
    return g.length > 0;
  }

  bool fit_strips(Geometry& g) const {
    const int64_t matrix = g.period * g.stride;
    if (matrix % g.block != 0 && matrix != g.numel) return false;  // blocks would straddle matrices
    const int64_t block_rows = g.block / std::gcd(g.block, g.period);
    // Strips take whole vectors each, also where they end inside one.
    const int64_t limit = std::min(tile_ / (g.period * vector_) * vector_, g.stride);
    const int64_t vector_rows = std::lcm(block_rows, vector_);
    g.rows = int32_t(vector_rows <= limit ? limit / vector_rows * vector_rows : limit / block_rows * block_rows);
    if (g.rows == 0) return false;
    g.layout = Layout::kStrips;
    g.span = matrix;
    g.length = int32_t(g.rows * g.period);
    g.tiles_per_span = uint32_t((g.stride + g.rows - 1) / g.rows);
    return true;
  }

  // As many threads to a unit as there are, but none without an element.
  static Geometry with_lanes(Geometry g) {
    if (g.length == 0) return g;
    const int64_t units = (g.length + g.unit - 1) / g.unit;
    while (2 * g.lanes * units <= kThreads && 2 * g.lanes <= g.unit) g.lanes *= 2;
    return g;
  }

  int64_t tile_, vector_;
};

}  // namespace adahessian::gpu
