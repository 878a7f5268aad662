// D = z * Hz (Eq. 6) and its means over averaging blocks (Eq. 7), vector by vector in logical order. The classes take
// or give one vector a call, so that a loop over several arrays can do their work while it waits for memory.
#pragma once

#include <algorithm>
#include <bit>

#include "tile.h"
#include "vector.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

// ---- the probe ------------------------------------------------------------------------------------------------------

constexpr int64_t kCallsPerTile = kTile / kSignsPerCall + 1;

// From a vector for each of a call's words to one call after the other.
template <typename E>
ADAHESSIAN_HD void store_call_after_call(const PhiloxWords<Bits<float>>& words, E* to) {
  constexpr int64_t vector = kVectorBytes / int64_t(sizeof(E));
  const auto& word = words.word;
  const Bits<float> even[] = {interleaved<0>(word[0], word[2]), interleaved<1>(word[0], word[2])};
  const Bits<float> odd[] = {interleaved<0>(word[1], word[3]), interleaved<1>(word[1], word[3])};
  store_vector(to, interleaved<0>(even[0], odd[0]));
  store_vector(to + vector, interleaved<1>(even[0], odd[0]));
  store_vector(to + 2 * vector, interleaved<0>(even[1], odd[1]));
  store_vector(to + 3 * vector, interleaved<1>(even[1], odd[1]));
}

// The signs of z for logical elements [begin, begin + size), one bit each; a set bit means -1.
class SignBits {
  static constexpr int64_t W = kLanes<float>;  // Philox calls side by side

 public:
  ADAHESSIAN_MEMBER void draw(const ProbeKey& key, int64_t begin, int64_t size) {
    const int64_t first_call = begin / kSignsPerCall;
    const int64_t calls = (begin + size + kSignsPerCall - 1) / kSignsPerCall - first_call;
    uint32_t drawn[kWords];
    for (int64_t done = 0; done < calls; done += W) {
      const auto words = rademacher_words(key, Bits<float>(lane_numbers<float>()) + uint32_t(first_call + done));
      store_call_after_call(words, drawn + done * 4);
    }
    const int64_t skipped = begin - first_call * kSignsPerCall, bits = skipped % 32;
    const uint32_t* from = drawn + skipped / 32;
    for (int64_t k = 0; k <= size / 32; ++k) words_[k] = from[k] >> bits | from[k + 1] << 1 << (31 - bits);
  }
  // All positive.
  ADAHESSIAN_MEMBER void clear() { std::fill(std::begin(words_), std::end(words_), 0u); }
  // Bit l is the sign of element i + l, counted from `begin`; at least 32 bits are valid.
  ADAHESSIAN_MEMBER uint64_t from(int64_t i) const {
    return load_vector<uint64_t>(words_ + i / 32) >> (uint64_t(i) % 32);
  }
  // The same for a multiple of 8 or of kLanes<S>, and bits for that many elements.
  template <typename S>
  ADAHESSIAN_MEMBER uint64_t of_vector(int64_t i) const {
    if constexpr (kLanes<S> % 8 != 0) return from(i);
    return load_vector<uint16_t>(reinterpret_cast<const char*>(words_) + i / 8);
  }

 private:
  static constexpr int64_t kWords = (kCallsPerTile + W) * 4;
  uint32_t words_[kWords];
};

// Changes the sign of the lanes whose bit is set.
template <typename S>
ADAHESSIAN_HD Vector<S> flip_signs(Vector<S> x, uint64_t bits) {
#if defined(__AVX512F__)
  const __m512i n = __m512i(x);
  if constexpr (sizeof(S) == 4)
    return Vector<S>(_mm512_mask_xor_epi32(n, __mmask16(bits), n, __m512i(Bits<S>{} + kSign<S>)));
  if constexpr (sizeof(S) == 8)
    return Vector<S>(_mm512_mask_xor_epi64(n, __mmask8(bits), n, __m512i(Bits<S>{} + kSign<S>)));
#else
  const Bits<S> to_the_top = Bits<S>(Signed<S>(kSignShift<S>) - lane_numbers<S>());
  const Bits<S> in_every_lane = Bits<S>{} + Unsigned<S>(bits);
  return Vector<S>(Bits<S>(x) ^ (in_every_lane << to_the_top & kSign<S>));
#endif
}

// z * Hz, or |Hz|, of a tile.
template <typename T>
class D {
 public:
  using S = StateOf<T>;
  ADAHESSIAN_MEMBER D(const T* hessian, const SignBits& signs, int64_t size, bool absolute)
      : hessian_(hessian), signs_(signs), size_(size), keep_(absolute ? ~kSign<S> : ~Unsigned<S>{0}) {}

  // Elements i ... i + W - 1, i being a multiple of 8 or of W; zero past the end, where nothing is read.
  ADAHESSIAN_MEMBER Vector<S> vector(int64_t i) const {
    if (i >= size_) return Vector<S>{};
    return i + kLanes<S> <= size_ ? whole_vector(i) : with_signs(load_last(hessian_ + i, size_ - i), i);
  }
  // The same where all of them are inside; i is a multiple of 8 or of W.
  ADAHESSIAN_MEMBER Vector<S> whole_vector(int64_t i) const { return with_signs(load_as_vector(hessian_ + i), i); }
  // Brings element i, which need not exist, into the cache.
  ADAHESSIAN_MEMBER void fetch(int64_t i) const { __builtin_prefetch(hessian_ + i, 0, 2); }
  ADAHESSIAN_MEMBER int64_t size() const { return size_; }

 private:
  ADAHESSIAN_MEMBER Vector<S> with_signs(Vector<S> h, int64_t i) const {
    return flip_signs<S>(Vector<S>(Bits<S>(h) & keep_), signs_.template of_vector<S>(i));
  }
#if defined(__AVX512F__)
  ADAHESSIAN_MEMBER static Vector<S> load_last(const T* from, int64_t count) {
    const uint32_t lanes = (1u << count) - 1;
    if constexpr (sizeof(T) == 8) return Vector<S>(_mm512_maskz_loadu_pd(__mmask8(lanes), from));
    if constexpr (sizeof(T) == 4) return Vector<S>(_mm512_maskz_loadu_ps(__mmask16(lanes), from));
    if constexpr (sizeof(T) == 2) {
      const Halves halves = Halves(_mm256_maskz_loadu_epi16(__mmask16(lanes), from));
      return Codec<T>::template decode<Vector<S>>(widened(halves));
    }
  }
#else
  [[gnu::noinline, gnu::cold]] static Vector<S> load_last(const T* from, int64_t count) {
    T whole[kLanes<S>] = {};
    std::copy_n(from, count, whole);
    return load_as_vector(whole);
  }
#endif

  const T* hessian_;
  const SignBits& signs_;
  int64_t size_;
  Unsigned<S> keep_;  // all bits, or all but the sign
};

// ---- blocks of at most a vector -------------------------------------------------------------------------------------

// Takes a tile's D vector by vector and gives for every lane the mean of its block, kDelay vectors later: one of them
// so that whoever uses a vector need not wait for its sums.
//
// The sums over the `block` lanes from each lane on come by doubling: w1 = x, w2[i] = w1[i] + w1[i+1], w4[i] = w2[i] +
// w2[i+2] and so on; the binary digits of `block` tell which of them make up the sum. Each level is one vector behind
// the level before. A last shuffle brings every lane the sum that begins at the first lane of its block.
template <typename S, int block>
class ShortBlocks {
  static constexpr int64_t W = kLanes<S>;
  static constexpr int kTop = std::bit_width(unsigned(block)) - 1;  // the level of the longest window
  static_assert(2 <= block && block <= W);

 public:
  static constexpr int64_t kDelay = kTop + 1;

  // The last block of `size` elements may be shorter than the others.
  ADAHESSIAN_MEMBER explicit ShortBlocks(int64_t size) : whole_(size - size % block), rest_(size % block) {}

  ADAHESSIAN_MEMBER Vector<S> push(Vector<S> x) {
    ADAHESSIAN_UNROLL
    for (int k = 0; k <= kTop; ++k) {
      ADAHESSIAN_UNROLL
      for (int age = kTop - k; age > 0; --age) level_[k][age] = level_[k][age - 1];
    }
    level_[0][0] = x;
    raise(std::make_integer_sequence<int, kTop>());
    const Vector<S> firsts = firsts_;
    const Vector<S> sums = collect<kTop - 1, (1 << kTop)>(level_[kTop][0]);
    firsts_ = pick<S>(before_, sums, load_vector<Index<S>>(kFirst.index[into_]));
    before_ = sums;
    into_ += into_ + W % block < block ? W % block : W % block - block;
    to_ += W;
    return to_ <= whole_ ? firsts * (S(1) / S(block)) : last_means(firsts);
  }

 private:
  // Where each lane finds the first lane of its block, in the vector before and its own laid end to end; a row for
  // each place within a block that lane 0 may have.
  struct FirstLanes {
    Signed<S> index[block][W];
    constexpr FirstLanes() : index() {
      for (int into = 0; into < block; ++into) {
        for (int l = 0; l < W; ++l) index[into][l] = Signed<S>(W + l - (into + l) % block);
      }
    }
  };
  static constexpr FirstLanes kFirst{};

  template <int... k>
  ADAHESSIAN_MEMBER void raise(std::integer_sequence<int, k...>) {
    ((level_[k + 1][0] = level_[k][1] + shifted<S, (1 << k)>(level_[k][1], level_[k][0])), ...);
  }
  template <int k, int offset>
  ADAHESSIAN_MEMBER Vector<S> collect(Vector<S> sum) {
    if constexpr (k < 0) {
      return sum;
    } else if constexpr ((block >> k & 1) == 0) {
      return collect<k - 1, offset>(sum);
    } else {
      const Vector<S> window = shifted<S, offset>(level_[k][kTop - k], level_[k][kTop - k - 1]);
      return collect<k - 1, offset + (1 << k)>(sum + window);
    }
  }
  // Of a vector that reaches into the shorter last block.
  ADAHESSIAN_MEMBER Vector<S> last_means(Vector<S> sums) const {
    for (int l = 0; l < W; ++l) sums[l] *= S(1) / S(to_ - W + l < whole_ ? block : std::max<int64_t>(rest_, 1));
    return sums;
  }

  int64_t whole_, rest_;
  int64_t to_ = -kDelay * W;                              // the element after the last lane that was given
  int64_t into_ = ((-kTop * W) % block + block) % block;  // how far into its block lane 0 of the next sums is
  Vector<S> level_[kTop + 1][kTop + 1] = {};              // level_[k][age]: w_(2^k), `age` vectors ago
  Vector<S> before_{}, firsts_{};                         // the window sums, and what was picked, a vector ago
};

// ---- blocks longer than a vector ------------------------------------------------------------------------------------

// Where a vector of consecutive elements lies: the lanes of the block that its first lane belongs to, and whether that
// block ends with it.
template <typename S>
struct InBlock {
  Index<S> lanes;
  bool ends;
};

// Walks over blocks, vector by vector.
template <typename S>
class BlockWalk {
  static constexpr int64_t W = kLanes<S>;

 public:
  ADAHESSIAN_MEMBER explicit BlockWalk(int64_t block) : block_(block), left_(block) {}
  ADAHESSIAN_MEMBER InBlock<S> next() {
    const InBlock<S> in = {lane_numbers<S>() < Signed<S>(left_), left_ <= W};
    left_ += (in.ends ? block_ : 0) - W;
    return in;
  }

 private:
  int64_t block_, left_;  // elements of the block from the next vector on
};

// Means of blocks, from vectors that are pushed one after the other. A row of partial sums is kept for each block.
template <typename S>
class BlockSums {
  static constexpr int64_t W = kLanes<S>;

 public:
  static constexpr int64_t kRows = kTile / W + W + 1;

  // `rows` is scratch of kRows vectors.
  ADAHESSIAN_MEMBER explicit BlockSums(Vector<S>* rows) : rows_(rows), row_(rows) { rows[0] = Vector<S>{}; }
  ADAHESSIAN_MEMBER void push(Vector<S> x, InBlock<S> in) {
    row_[0] += where<S>(in.lanes, x);
    row_[1] = where<S>(~in.lanes, x);
    row_ += in.ends;
  }
  // Means of the blocks of `size` elements; writes up to a vector past the last one.
  ADAHESSIAN_MEMBER void end(int64_t size, int64_t block, S* means) {
    const int64_t whole = size / block, rest = size % block, count = whole + (rest > 0);
    for (int64_t i = count; i % W != 0; ++i) rows_[i] = Vector<S>{};
    for (int64_t i = 0; i < count; i += W) store_vector(means + i, sum_of_each<S>(rows_ + i) * (S(1) / S(block)));
    if (rest > 0) means[whole] *= S(block) / S(rest);
  }

 private:
  Vector<S>*rows_, *row_;
};

// Repeats means over their blocks, vector by vector; the blocks are at least a vector long. Reads one mean too many.
template <typename S>
class SpreadMeans {
 public:
  ADAHESSIAN_MEMBER explicit SpreadMeans(const S* means) : mean_(means) {}
  ADAHESSIAN_MEMBER Vector<S> next(InBlock<S> in) {
    const Vector<S> here = broadcast<S>(mean_[0]), after = broadcast<S>(mean_[1]);
    mean_ += in.ends;
    return in.lanes ? here : after;
  }

 private:
  const S* mean_;
};

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
