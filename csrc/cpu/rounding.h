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
  store_vector(to, __builtin_convertvector(round_stochastically(Bits<float>(x), bits) >> 16, Halves));
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
  static constexpr int64_t W = kLanes<float>;  // Philox calls side by side

 public:
  ADAHESSIAN_MEMBER explicit Rounding(const RoundingKey& key) : key_(key) {}
  // Those of elements i ... i + W - 1.
  ADAHESSIAN_MEMBER Bits<float> from(int64_t i) {
    if (i + W > end_) draw(i / kRoundingsPerCall);
    return __builtin_convertvector(load_vector<Halves>(bits_ + (i - end_) + std::size(bits_)), Bits<float>);
  }

 private:
  [[gnu::noinline]] void draw(int64_t call) {
    const auto words = rounding_words(key_, Bits<float>(lane_numbers<float>()) + uint32_t(call));
    store_call_after_call(words, bits_);
    end_ = (call + W) * kRoundingsPerCall;
  }

  RoundingKey key_;
  int64_t end_ = 0;  // of the elements that bits_ are for
  uint16_t bits_[W * kRoundingsPerCall];
};

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
