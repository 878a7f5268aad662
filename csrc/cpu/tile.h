// What the three CPU ops share: the cut of segments into tiles that stay in the L1 cache, the probe's signs and the
// block means of a tile. A tile is a range of logical elements of one parameter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../launch.h"

// One object serves every x86-64: the compiler vectorises the same plain loop for each instruction set, the loader
// picks one. With -ffp-contract=off all of them round alike.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
#define ADAHESSIAN_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define ADAHESSIAN_CLONES
#endif
#define ADAHESSIAN_INLINE_LAMBDA __attribute__((always_inline))  // so that it is compiled with its caller's clone

namespace adahessian::cpu {

constexpr int64_t kTile = 2048;     // elements; three float arrays of this length fit into the L1 cache
constexpr int64_t kLanes = 8;       // Philox calls side by side
constexpr int64_t kGrain = 4;       // tiles a thread takes at least
constexpr int64_t kRowBlock = 128;  // from this length on an averaging block is summed by itself
constexpr int64_t kPadding = 64;    // elements that vector code may run past the end of a tile's scratch

struct Tile {
  const Segment* segment;
  int64_t index;  // among the segment's tiles
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Averaging blocks never straddle tiles unless they are longer than a tile; then tiles never straddle blocks.
struct SegmentTiling {
  int64_t span, length, per_span;

  explicit SegmentTiling(const Segment& s) {
    const bool is_long = s.block > kTile;
    span = is_long ? s.block : std::max<int64_t>(s.numel, 1);
    // Whole averaging blocks and, where that fits, whole vectors.
    const int64_t unit = std::lcm(s.block, int64_t{16});
    length = is_long ? kTile : kTile / (unit <= kTile ? unit : s.block) * (unit <= kTile ? unit : s.block);
    per_span = (span + length - 1) / length;
  }
  int64_t count(const Segment& s) const { return s.numel / span * per_span + (s.numel % span + length - 1) / length; }
  Tile tile(const Segment& s, int64_t index) const {
    const int64_t first = index / per_span * span;
    const int64_t begin = first + index % per_span * length;
    return {&s, index, begin, std::min({begin + length, first + span, s.numel})};
  }
};

// All tiles of all segments, numbered through; run() hands each to body(tile, segment number) on the thread pool.
class Tiling {
 public:
  explicit Tiling(const std::vector<Segment>& segments) : segments_(segments) {
    first_.reserve(segments.size() + 1);
    tilings_.reserve(segments.size());
    first_.push_back(0);
    for (const Segment& s : segments) {
      tilings_.emplace_back(s);
      first_.push_back(first_.back() + tilings_.back().count(s));
    }
  }

  int64_t first(size_t segment) const { return first_[segment]; }
  int64_t count() const { return first_.back(); }

  template <typename Body>
  void run(const Context& context, const Body& body) const {
    context.parallel_for(0, count(), kGrain, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t t = begin; t < end; ++t) {
        while (t >= first_[i + 1]) ++i;
        body(tilings_[i].tile(segments_[i], t - first_[i]), i);
      }
    });
  }

 private:
  const std::vector<Segment>& segments_;
  std::vector<SegmentTiling> tilings_;
  std::vector<int64_t> first_;
};

inline ProbeKey probe_key(const Probe& probe, const Segment& s, const Counts& counts) {
  return {probe.seed, s.param_id, uint32_t(counts.steps[2 * s.slot + 1]), probe.sample};
}

// Cuts a range of logical elements into strips that are contiguous in storage and calls
// body(first element of the strip counted from `begin`, its logical step, first storage index, length).
template <typename Body>
ADAHESSIAN_HD void for_each_strip(const Segment& s, int64_t begin, int64_t end, const Body& body) {
  if (s.period == 1) {
    body(0, 1, begin, end - begin);
    return;
  }
  const int64_t matrix = s.period * s.stride;
  for (int64_t origin = begin / matrix * matrix; origin < end; origin += matrix) {
    const int64_t low = std::max(begin - origin, int64_t{0}), high = std::min(end - origin, matrix);
    for (int64_t k = 0; k < s.period; ++k) {
      // Logical elements i * period + k of this matrix inside [low, high).
      const int64_t first = (std::max(low - k, int64_t{0}) + s.period - 1) / s.period;
      const int64_t last = (std::max(high - k, int64_t{0}) + s.period - 1) / s.period;
      if (first < last) {
        body(origin + first * s.period + k - begin, s.period, origin + k * s.stride + first, last - first);
      }
    }
  }
}

// The sign bit of z for `size` logical elements from `begin` on: 0 or 0x80000000. Returns where they start in `signs`,
// which has room for whole Philox calls on both sides.
using SignScratch = uint32_t[kTile + 2 * kSignsPerCall];

ADAHESSIAN_HD const uint32_t* draw_signs(const ProbeKey& key, int64_t begin, int64_t size, SignScratch& signs) {
  const int64_t first_call = begin / kSignsPerCall;
  const int64_t calls = (begin + size + kSignsPerCall - 1) / kSignsPerCall - first_call;
  for (int64_t done = 0; done < calls; done += kLanes) {
    uint32_t words[4][kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {  // always all lanes, so that the loop is vectorised
      const PhiloxWords drawn = rademacher_words(key, uint32_t(first_call + done + i));
      for (int w = 0; w < 4; ++w) words[w][i] = drawn.word[w];
    }
    for (int64_t i = 0; i < std::min(kLanes, calls - done); ++i) {
      for (int w = 0; w < 4; ++w) {
        uint32_t* out = signs + (done + i) * kSignsPerCall + w * 32;
        const uint32_t word = words[w][i];
        for (uint32_t bit = 0; bit < 32; ++bit) out[bit] = (word & (1u << bit)) ? 0x80000000u : 0u;
      }
    }
  }
  return signs + (begin - first_call * kSignsPerCall);
}

ADAHESSIAN_HD float flip_sign(float x, uint32_t sign) { return bit_cast<float>(bit_cast<uint32_t>(x) ^ sign); }
ADAHESSIAN_HD double flip_sign(double x, uint32_t sign) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ (uint64_t{sign} << 32));
}
ADAHESSIAN_HD float magnitude(float x) { return fabsf(x); }
ADAHESSIAN_HD double magnitude(double x) { return fabs(x); }

// D = z * Hz (Eq. 6), or |D|, of a tile in logical order.
template <typename T>
ADAHESSIAN_HD void tile_d(const Tile& tile, const Probe& probe, const ProbeKey& key, StateOf<T>* d) {
  const Segment& s = *tile.segment;
  const T* hessian = static_cast<const T*>(s.hessian);
  SignScratch scratch;
  // |z * Hz| = |Hz|: no signs for absolute values.
  const bool draw = probe.draw && !s.absolute;
  const uint32_t* signs = draw ? draw_signs(key, tile.begin, tile.size(), scratch) : nullptr;
  for_each_strip(s, tile.begin, tile.end,
                 [&](int64_t first, int64_t step, int64_t stored, int64_t size) ADAHESSIAN_INLINE_LAMBDA {
                   const T* h = hessian + stored;
                   if (step == 1 && draw) {
                     for (int64_t n = 0; n < size; ++n) d[n] = flip_sign(load_as(h[n]), signs[n]);
                   } else if (step == 1) {
                     for (int64_t n = 0; n < size; ++n) d[n] = load_as(h[n]);
                   } else {
                     for (int64_t n = 0; n < size; ++n) {
                       const int64_t l = first + n * step;
                       d[l] = flip_sign(load_as(h[n]), draw ? signs[l] : 0u);
                     }
                   }
                 });
  if (s.absolute) {
    for (int64_t n = 0; n < tile.size(); ++n) d[n] = magnitude(d[n]);
  }
}

// Sixteen numbers side by side; the compiler cuts them to the width of the instruction set.
template <typename S>
struct Vector16;
template <>
struct Vector16<float> {
  using type [[gnu::vector_size(64)]] = float;
  using mask [[gnu::vector_size(64)]] = int32_t;
};
template <>
struct Vector16<double> {
  using type [[gnu::vector_size(128)]] = double;
  using mask [[gnu::vector_size(128)]] = int64_t;
};

// Neighbours of a and b added up within each quarter: a0+a1, a2+a3, b0+b1, b2+b3, and so on. No number leaves its
// quarter, which makes each shuffle a single instruction.
#define ADAHESSIAN_ADD_PAIRS(a, b)                                                            \
  (__builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) + \
   __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31))

// Sums of `count` <= 16 rows of n numbers each; row r starts at x + r * distance. Sixteen partial sums a row, then a
// tree. Reads up to 15 numbers past a row and leaves them out; writes 16 sums.
template <typename S>
ADAHESSIAN_HD void sum_rows(const S* x, int64_t distance, int64_t count, int64_t n, S* sums) {
  using V = typename Vector16<S>::type;
  using Mask = typename Vector16<S>::mask;
  Mask in_row;
  for (int j = 0; j < 16; ++j) in_row[j] = j < n % 16 ? -1 : 0;
  V row[16];
  for (int64_t r = 0; r < 16; ++r) {
    const S* begin = x + std::min(r, count - 1) * distance;
    Mask tail;
    memcpy(&tail, begin + n / 16 * 16, sizeof(V));
    row[r] = V(tail & in_row);
    for (int64_t i = 0; i + 16 <= n; i += 16) {
      V chunk;
      memcpy(&chunk, begin + i, sizeof(V));
      row[r] += chunk;
    }
  }
  for (int r = 0; r < 8; ++r) row[r] = ADAHESSIAN_ADD_PAIRS(row[2 * r], row[2 * r + 1]);
  for (int r = 0; r < 4; ++r) row[r] = ADAHESSIAN_ADD_PAIRS(row[2 * r], row[2 * r + 1]);
  // Each quarter of row[r] has a part of the sums 4 r ... 4 r + 3: add the quarters of two rows at a time.
  for (int r = 0; r < 2; ++r) {
    row[r] =
        __builtin_shufflevector(row[2 * r], row[2 * r + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(row[2 * r], row[2 * r + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  const V all = __builtin_shufflevector(row[0], row[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                __builtin_shufflevector(row[0], row[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  memcpy(sums, &all, sizeof(V));
}

// Sum of n numbers, as sixteen rows and what is left.
template <typename S>
ADAHESSIAN_HD S sum_of(const S* x, int64_t n) {
  S sums[16];
  sum_rows(x, n / 16, 16, n / 16, sums);
  for (int64_t i = n / 16 * 16; i < n; ++i) sums[i % 16] += x[i];
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// Blocks shorter than a vector: the loop is vectorised over blocks.
template <int64_t block, typename S>
ADAHESSIAN_HD void short_block_sums(const S* d, int64_t count, S* sums) {
  for (int64_t i = 0; i < count; ++i) {
    S sum = d[i * block];
    for (int64_t k = 1; k < block; ++k) sum += d[i * block + k];
    sums[i] = sum;
  }
}

// Means of the averaging blocks of a tile (Eq. 7).
template <typename S>
ADAHESSIAN_HD void block_means(const S* d, int64_t size, int64_t block, S* means) {
  const int64_t whole = size / block, rest = size % block;
  switch (block) {
    case 2: short_block_sums<2>(d, whole, means); break;
    case 3: short_block_sums<3>(d, whole, means); break;
    case 4: short_block_sums<4>(d, whole, means); break;
    default:
      if (block < kRowBlock) {  // sixteen blocks side by side
        for (int64_t i = 0; i < whole; i += 16)
          sum_rows(d + i * block, block, std::min<int64_t>(whole - i, 16), block, means + i);
      } else {
        for (int64_t i = 0; i < whole; ++i) means[i] = sum_of(d + i * block, block);
      }
  }
  for (int64_t i = 0; i < whole; ++i) means[i] *= S(1) / S(block);
  if (rest > 0) means[whole] = sum_of(d + whole * block, rest) / S(rest);
}

// Repeats each mean over its block. Stores run in whole vectors past the end of a block; the next block overwrites
// them.
template <int64_t vector, typename S>
ADAHESSIAN_HD void spread_in_vectors(const S* means, int64_t size, int64_t block, S* spread) {
  static_assert(vector <= kPadding, "the last store runs up to a vector past the tile");
  for (int64_t begin = 0; begin < size; begin += block, ++means) {
    const S mean = *means;
    int64_t k = 0;
    do {
      for (int64_t j = 0; j < vector; ++j) spread[begin + k + j] = mean;
      k += vector;
    } while (block > vector && k < block && begin + k < size);
  }
}

template <typename S>
ADAHESSIAN_HD void spread_means(const S* means, int64_t size, int64_t block, S* spread) {
  block <= 8 ? spread_in_vectors<8>(means, size, block, spread) : spread_in_vectors<16>(means, size, block, spread);
}

// Means of the blocks that are longer than a tile, for each segment; empty for segments whose blocks are short.
// Every tile sums its part, the parts are added in order. Defined in long_blocks.cpp for float and double.
template <typename S>
std::vector<std::vector<S>> long_block_means(Dtype dtype, const std::vector<Segment>& segments, const Tiling& tiling,
                                             const Probe& probe, const Counts& counts, const Context& context);

inline bool any_long_block(const std::vector<Segment>& segments) {
  return std::any_of(segments.begin(), segments.end(), [](const Segment& s) { return s.block > kTile; });
}

// Calls f with a value of the element type that `dtype` names.
template <typename F>
void dispatch(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(bfloat16{});
    case Dtype::kFloat16: return f(float16{});
    case Dtype::kFloat64: return f(double{});
  }
}

}  // namespace adahessian::cpu
