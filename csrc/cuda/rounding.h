// Device side: the random bits that round the states of a slot to bfloat16.
#pragma once

#include "tile.h"

namespace adahessian::gpu {

// The keys of all rounds, which no thread has to add up: instructions take them from the kernel's arguments.
struct RoundingKeys {
  uint32_t k0[kRoundingRounds], k1[kRoundingRounds];
  static RoundingKeys of(uint64_t seed) {
    const PhiloxKeys keys = {uint32_t(seed), uint32_t(seed >> 32)};
    RoundingKeys all;
    for (int i = 0; i < kRoundingRounds; ++i) all.k0[i] = keys.first(i), all.k1[i] = keys.second(i);
    return all;
  }
  ADAHESSIAN_MEMBER uint32_t first(int round) const { return k0[round]; }
  ADAHESSIAN_MEMBER uint32_t second(int round) const { return k1[round]; }
};

// As adahessian::RoundingKey.
struct RoundingKey {
  const RoundingKeys& seed;
  uint32_t param_id, step;
  ADAHESSIAN_MEMBER const RoundingKeys& keys() const { return seed; }
};

// 16 bits for each of 8 elements, two to a word.
struct SlotBits {
  uint32_t word[4];
};

// Those of element e; for v with their bytes exchanged.
template <bool for_v>
ADAHESSIAN_HD uint32_t bits_of(const SlotBits& bits, int e) {
  const uint32_t word = bits.word[e / 2];
#ifdef __CUDA_ARCH__  // two bytes and two zeros, one instruction
  return __byte_perm(word, 0, (for_v ? 0x4401 : 0x4410) + 0x22 * (e % 2));
#else
  const uint32_t half = word >> (16 * (e % 2)) & 0xFFFFu;
  return for_v ? swap_bytes(half) : half;
#endif
}

// The bits of 8 elements from any one on: of one call, or the end of one and the beginning of the next.
ADAHESSIAN_HD SlotBits consecutive_bits(const RoundingKey& key, int64_t first) {
  const uint32_t call = uint32_t(first / kRoundingsPerCall);
  const int shift = int(first % kRoundingsPerCall);
  const PhiloxWords<uint32_t> low = rounding_words(key, call);
  if (shift == 0) return {{low.word[0], low.word[1], low.word[2], low.word[3]}};
  const PhiloxWords<uint32_t> high = rounding_words(key, call + 1);
  uint32_t word[8];
  ADAHESSIAN_UNROLL
  for (int w = 0; w < 4; ++w) word[w] = low.word[w], word[w + 4] = high.word[w];
  // No index that is known at run time only: the words would not be registers.
  ADAHESSIAN_UNROLL
  for (int w = 0; w < 6; ++w) word[w] = shift & 4 ? word[w + 2] : word[w];
  ADAHESSIAN_UNROLL
  for (int w = 0; w < 5; ++w) word[w] = shift & 2 ? word[w + 1] : word[w];
  ADAHESSIAN_UNROLL
  for (int w = 0; w < 4; ++w) word[w] = shift & 1 ? word[w] >> 16 | word[w + 1] << 16 : word[w];
  return {{word[0], word[1], word[2], word[3]}};
}

// The bits of one element.
ADAHESSIAN_HD uint32_t single_bits(const RoundingKey& key, int64_t index) {
  const PhiloxWords<uint32_t> words = rounding_words(key, uint32_t(index / kRoundingsPerCall));
  const uint32_t low = index & 2 ? words.word[1] : words.word[0], high = index & 2 ? words.word[3] : words.word[2];
  return (index & 4 ? high : low) >> (16 * (index & 1)) & 0xFFFFu;
}

template <Order kOrder>
ADAHESSIAN_HD SlotBits slot_bits(const RoundingKey& key, const Tile& tile, const Slot& slot) {
  constexpr int kVector = kRoundingsPerCall;
  if (kOrder == Order::kAny && tile.layout == Layout::kGather) {
    SlotBits bits = {};
    for_each_place<kVector>(
        tile, slot, [&](int e, int64_t index) { bits.word[e / 2] |= single_bits(key, index) << (16 * (e % 2)); });
    return bits;
  }
  if (kOrder != Order::kFlat) return consecutive_bits(key, slot.first);
  const PhiloxWords<uint32_t> words = rounding_words(key, uint32_t(slot.first / kRoundingsPerCall));
  return {{words.word[0], words.word[1], words.word[2], words.word[3]}};
}

// The upper halves of two words.
ADAHESSIAN_HD uint32_t upper_halves(uint32_t low, uint32_t high) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, 0x7632);
#else
  return low >> 16 | (high & 0xFFFF0000u);
#endif
}

// The numbers x in bfloat16. kSmall: none of them is so large that it could become infinite.
template <bool for_v, bool kSmall, int n>
ADAHESSIAN_HD void set_rounded(Vec<bfloat16, n>& vec, const Vec<float, n>& x, const SlotBits& bits) {
  const auto rounded = [&](int e) {
    const uint32_t word = bit_cast<uint32_t>(get(x, e)), random = bits_of<for_v>(bits, e);
    return kSmall ? word + random : round_stochastically(word, random);
  };
  ADAHESSIAN_UNROLL
  for (int e = 0; e < n; e += 2) vec.word[e / 2] = upper_halves(rounded(e), rounded(e + 1));
}

}  // namespace adahessian::gpu
