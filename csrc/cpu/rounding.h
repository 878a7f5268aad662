// How m and v reach memory: as they are, or in bfloat16, rounded by random bits that are drawn on the way.
#pragma once

#include "block_mean.h"
#include "vector.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

// States that are stored in the type they are computed in.
struct NoBits {};
ADAHESSIAN_HD NoBits swap_bytes(NoBits none) { return none; }
ADAHESSIAN_HD Bits<float> swap_bytes(Bits<float> bits) {
#if defined(__AVX512BW__)
  return Bits<float>(_mm512_shuffle_epi8(
      __m512i(bits), _mm512_broadcast_i32x4(_mm_set_epi64x(0x0F0E0C0D0B0A0809, 0x0706040503020001))));
#elif defined(__AVX2__)
  return Bits<float>(_mm256_shuffle_epi8(__m256i(bits), _mm256_set_epi64x(0x0F0E0C0D0B0A0809, 0x0706040503020001,
                                                                          0x0F0E0C0D0B0A0809, 0x0706040503020001)));
#else
  return adahessian::swap_bytes(bits);
#endif
}

template <typename S>
ADAHESSIAN_HD void store_state(S* to, Vector<S> x, NoBits) {
  store_vector(to, x);
}
ADAHESSIAN_HD void store_state(bfloat16* to, Vector<float> x, Bits<float> bits) {
  store_vector(to, narrowed(round_stochastically(Bits<float>(x), bits) >> 16));
}

template <typename M>
class Rounding {
 public:
  ADAHESSIAN_MEMBER explicit Rounding(const RoundingKey&) {}
  ADAHESSIAN_MEMBER int64_t draw(int64_t, int64_t end) { return end; }
  ADAHESSIAN_MEMBER NoBits from(int64_t) const { return {}; }
};

// The random bits of a parameter's stored elements.
template <>
class Rounding<bfloat16> {
  static constexpr int64_t W = kLanes<float>;
  static constexpr int64_t kCalls = 64;  // drawn at a time, at most

 public:
  ADAHESSIAN_MEMBER explicit Rounding(const RoundingKey& key) : key_(key) {}
  // Has the bits of a vector from element i on ready, and of those behind it up to an element that it returns: `end`,
  // or less if these are many.
  ADAHESSIAN_MEMBER int64_t draw(int64_t i, int64_t end) {
    if (i < begin_ || i + W > end_) refill(i, std::max(end, i + W));
    return std::min(end, end_);
  }
  // Those of elements i ... i + W - 1.
  ADAHESSIAN_MEMBER Bits<float> from(int64_t i) const { return widened(load_vector<Halves>(bits_ + (i - begin_))); }

 private:
  [[gnu::noinline]] void refill(int64_t i, int64_t end) {
    const int64_t first = i / kRoundingsPerCall, last = (end - 1) / kRoundingsPerCall;
    int64_t done = 0;
    for (; done < kCalls && first + done <= last; done += W) {
      // Even and odd calls apart, in 64-bit lanes: Philox multiplies 32-bit numbers to 64 bits.
      const Bits<double> even = Bits<double>(2 * lane_numbers<double>()) + uint64_t(first + done);
      const auto [of_even] = rounding_words(key_, even);
      const auto [of_odd] = rounding_words(key_, even + 1);
      PhiloxWords<Bits<float>> words;
      for (int w = 0; w < 4; ++w) words.word[w] = Bits<float>((of_even[w] & 0xFFFFFFFFu) | of_odd[w] << 32);
      store_call_after_call(words, bits_ + done * kRoundingsPerCall);
    }
    begin_ = first * kRoundingsPerCall, end_ = begin_ + done * kRoundingsPerCall;
  }

  RoundingKey key_;
  int64_t begin_ = 0, end_ = 0;  // of the elements that bits_ are for
  uint16_t bits_[kCalls * kRoundingsPerCall];
};

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
