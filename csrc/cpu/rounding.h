// How m and v reach memory: as they are, or in bfloat16, rounded by random bits that are drawn on the way.
#pragma once

#include "block_mean.h"
#include "vector.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

// States that are stored in the type they are computed in.
struct NoBits {};
using adahessian::swap_bytes;
ADAHESSIAN_HD NoBits swap_bytes(NoBits none) { return none; }

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
  ADAHESSIAN_MEMBER NoBits from(int64_t) { return {}; }
};

// The random bits of a parameter's stored elements, asked for in increasing order.
template <>
class Rounding<bfloat16> {
  static constexpr int64_t W = kLanes<float>;
  static constexpr int64_t kCalls = 16;  // drawn at a time

 public:
  ADAHESSIAN_MEMBER explicit Rounding(const RoundingKey& key) : key_(key) {}
  // Those of elements i ... i + W - 1.
  ADAHESSIAN_MEMBER Bits<float> from(int64_t i) {
    if (i + W > end_) draw(i / kRoundingsPerCall);
    return widened(load_vector<Halves>(bits_ + (i - end_) + std::size(bits_)));
  }

 private:
  [[gnu::noinline]] void draw(int64_t call) {
    end_ = (call + kCalls) * kRoundingsPerCall;
    for (int64_t done = 0; done < kCalls; done += W) {
      // Even and odd calls apart, in 64-bit lanes: Philox multiplies 32-bit numbers to 64 bits.
      const Bits<double> even = Bits<double>(2 * lane_numbers<double>()) + uint64_t(call + done);
      const auto [of_even] = rounding_words(key_, even);
      const auto [of_odd] = rounding_words(key_, even + 1);
      PhiloxWords<Bits<float>> words;
      for (int w = 0; w < 4; ++w) words.word[w] = Bits<float>((of_even[w] & 0xFFFFFFFFu) | of_odd[w] << 32);
      store_call_after_call(words, bits_ + done * kRoundingsPerCall);
    }
  }

  RoundingKey key_;
  int64_t end_ = 0;  // of the elements that bits_ are for
  uint16_t bits_[kCalls * kRoundingsPerCall];
};

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
