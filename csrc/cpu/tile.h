// What the three CPU ops share: the cut of segments into tiles that stay in the L1 cache, the probe's signs and the
// block means of a tile. A tile is a range of logical elements of one parameter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../launch.h"

// One object serves every x86-64: the compiler vectorises the same plain loop for each instruction set, the loader picks
// one. With -ffp-contract=off all of them round alike.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
#define ADAHESSIAN_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define ADAHESSIAN_CLONES
#endif
#define ADAHESSIAN_INLINE_LAMBDA __attribute__((always_inline))  // so that it is compiled with its caller's clone

namespace adahessian::cpu {

constexpr int64_t kTile = 2048;  // most elements of a tile: three float arrays of this length fit into the L1 cache
// Usual length of a tile. Short, because while its diagonal is worked out of the cache, the hardware fetches the tensors
// of its update, and it only looks some 20 cache lines ahead.
constexpr int64_t kUsualTile = 512;
constexpr int64_t kGrain = 16;  // tiles a thread takes at least
constexpr int64_t kRowBlock = 64;  // from this length on an averaging block is summed by itself
constexpr int64_t kPadding = 8 * kRowBlock;  // elements that vector code may run past the end of a tile's scratch

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
    length = is_long ? kTile : s.block >= kUsualTile ? s.block : kUsualTile / s.block * s.block;
    per_span = (span + length - 1) / length;
  }
  int64_t count(const Segment& s) const {
    return s.numel / span * per_span + (s.numel % span + length - 1) / length;
  }
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
  constexpr int64_t kMaxCalls = (kTile + 2 * kSignsPerCall) / kSignsPerCall;
  uint32_t words[4][kMaxCalls];
  const int64_t first_call = begin / kSignsPerCall;
  const int64_t calls = (begin + size + kSignsPerCall - 1) / kSignsPerCall - first_call;
  for (int64_t i = 0; i < calls; ++i) {
    const PhiloxWords drawn = rademacher_words(key, uint32_t(first_call + i));
    for (int w = 0; w < 4; ++w) words[w][i] = drawn.word[w];
  }
  for (int64_t i = 0; i < calls; ++i) {
    for (int w = 0; w < 4; ++w) {
      uint32_t* out = signs + i * kSignsPerCall + w * 32;
      const uint32_t word = words[w][i];
      for (uint32_t bit = 0; bit < 32; ++bit) out[bit] = (word & (1u << bit)) ? 0x80000000u : 0u;
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
  for_each_strip(s, tile.begin, tile.end, [&](int64_t first, int64_t step, int64_t stored, int64_t size)
                                              ADAHESSIAN_INLINE_LAMBDA {
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

// Eight numbers side by side; the compiler cuts them to the width of the instruction set.
template <typename S>
struct Vector8;
template <>
struct Vector8<float> {
  using type [[gnu::vector_size(32)]] = float;
  using mask [[gnu::vector_size(32)]] = int32_t;
};
template <>
struct Vector8<double> {
  using type [[gnu::vector_size(64)]] = double;
  using mask [[gnu::vector_size(64)]] = int64_t;
};

// Neighbours of a and b added up: (a0+a1, a2+a3, ..., b0+b1, ...).
#define ADAHESSIAN_ADD_PAIRS(a, b)                                   \
  (__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + \
   __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15))

// Sums of eight rows of n numbers each; row r starts at x + r * distance. Eight partial sums a row, then a tree. Reads up
// to 7 numbers past a row and leaves them out.
template <typename S>
ADAHESSIAN_HD void sum_rows(const S* x, int64_t distance, int64_t n, S* sums) {
  using V = typename Vector8<S>::type;
  using Mask = typename Vector8<S>::mask;
  Mask in_row;
  for (int j = 0; j < 8; ++j) in_row[j] = j < n % 8 ? -1 : 0;
  V row[8];
  for (int r = 0; r < 8; ++r) {
    Mask tail;
    memcpy(&tail, x + r * distance + n / 8 * 8, sizeof(V));
    row[r] = V(tail & in_row);
  }
  for (int64_t i = 0; i + 8 <= n; i += 8) {
    for (int r = 0; r < 8; ++r) {
      V chunk;
      memcpy(&chunk, x + r * distance + i, sizeof(V));
      row[r] += chunk;
    }
  }
  const V sums01 = ADAHESSIAN_ADD_PAIRS(row[0], row[1]), sums23 = ADAHESSIAN_ADD_PAIRS(row[2], row[3]);
  const V sums45 = ADAHESSIAN_ADD_PAIRS(row[4], row[5]), sums67 = ADAHESSIAN_ADD_PAIRS(row[6], row[7]);
  const V low = ADAHESSIAN_ADD_PAIRS(sums01, sums23), high = ADAHESSIAN_ADD_PAIRS(sums45, sums67);
  const V all = ADAHESSIAN_ADD_PAIRS(low, high);
  memcpy(sums, &all, sizeof(V));
}

// Sum of n numbers, as eight rows and what is left.
template <typename S>
ADAHESSIAN_HD S sum_of(const S* x, int64_t n) {
  S sums[8];
  sum_rows(x, n / 8, n / 8, sums);
  S rest = 0;
  for (int64_t i = n / 8 * 8; i < n; ++i) rest += x[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])) + rest;
}

// Blocks shorter than a vector: the loop is vectorised over blocks.
template <int64_t block, typename S>
ADAHESSIAN_HD void short_block_means(const S* d, int64_t count, S* means) {
  for (int64_t i = 0; i < count; ++i) {
    S sum = d[i * block];
    for (int64_t k = 1; k < block; ++k) sum += d[i * block + k];
    means[i] = sum * (S(1) / S(block));
  }
}

// Means of the averaging blocks of a tile (Eq. 7). `d` and `means` are padded.
template <typename S>
ADAHESSIAN_HD void block_means(const S* d, int64_t size, int64_t block, S* means) {
  const int64_t whole = size / block, rest = size % block;
  switch (block) {
    case 2: short_block_means<2>(d, whole, means); break;
    case 3: short_block_means<3>(d, whole, means); break;
    case 4: short_block_means<4>(d, whole, means); break;
    default:
      if (block < kRowBlock) {  // eight blocks at a time; those past the last land in the padding
        for (int64_t i = 0; i < whole; i += 8) sum_rows(d + i * block, block, block, means + i);
      } else {
        for (int64_t i = 0; i < whole; ++i) means[i] = sum_of(d + i * block, block);
      }
      for (int64_t i = 0; i < whole; ++i) means[i] *= S(1) / S(block);
  }
  if (rest > 0) means[whole] = sum_of(d + whole * block, rest) / S(rest);
}

// Repeats each mean over its block. Stores run in whole vectors past the end of a block; the next block overwrites them.
template <int64_t vector, typename S>
ADAHESSIAN_HD void spread_in_vectors(const S* means, int64_t size, int64_t block, S* spread) {
  static_assert(vector <= kPadding, "the last store runs up to a vector past the tile");
  for (int64_t begin = 0; begin < size; begin += block, ++means) {
    const S mean = *means;
    for (int64_t k = 0; k < block && begin + k < size; k += vector) {
      for (int64_t j = 0; j < vector; ++j) spread[begin + k + j] = mean;
    }
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
