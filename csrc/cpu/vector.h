// Vectors as wide as the instruction set this file is compiled for, on the compiler's own vector types.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>  // in a fifth of the time
#endif

#include "../dtypes.h"

#define ADAHESSIAN_INLINE_LAMBDA __attribute__((always_inline))

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

static_assert(std::endian::native == std::endian::little, "which of two lanes is the upper half of a wider one");

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename S>
constexpr int kLanes = kVectorBytes / int(sizeof(S));

// Unsigned and signed integers of the size of a float or a double.
template <typename S>
struct Integers;
template <>
struct Integers<float> {
  using Unsigned = uint32_t;
  using Signed = int32_t;
};
template <>
struct Integers<double> {
  using Unsigned = uint64_t;
  using Signed = int64_t;
};

template <typename S>
using Unsigned = typename Integers<S>::Unsigned;
template <typename S>
using Signed = typename Integers<S>::Signed;

template <typename S>
constexpr int kSignShift = 8 * int(sizeof(S)) - 1;
template <typename S>
constexpr Unsigned<S> kSign = Unsigned<S>{1} << kSignShift<S>;

template <typename S>
struct VectorTypes {
  using Vector [[gnu::vector_size(kVectorBytes)]] = S;
  using Bits [[gnu::vector_size(kVectorBytes)]] = typename Integers<S>::Unsigned;
  using Index [[gnu::vector_size(kVectorBytes)]] = typename Integers<S>::Signed;
};
template <typename S>
using Vector = typename VectorTypes<S>::Vector;
template <typename S>
using Bits = typename VectorTypes<S>::Bits;
template <typename S>
using Index = typename VectorTypes<S>::Index;

using Halves [[gnu::vector_size(kVectorBytes / 2)]] = uint16_t;

template <typename V, typename Element>
ADAHESSIAN_HD V load_vector(const Element* from) {
  V vector;
  memcpy(&vector, from, sizeof(V));
  return vector;
}
template <typename V, typename Element>
ADAHESSIAN_HD void store_vector(Element* to, V vector) {
  memcpy(to, &vector, sizeof(V));
}

// Lane numbers 0, 1, 2, ...
template <typename S>
ADAHESSIAN_HD Index<S> lane_numbers() {
  Index<S> lanes;
  for (int l = 0; l < kLanes<S>; ++l) lanes[l] = l;
  return lanes;
}

// x in every lane. (x - 0 is x for the compiler too; 0 + x is not, because of -0.)
template <typename S>
ADAHESSIAN_HD Vector<S> broadcast(S x) {
  return x - Vector<S>{};
}

// Lanes where the mask is set; zero elsewhere.
template <typename S>
ADAHESSIAN_HD Vector<S> where(Index<S> mask, Vector<S> x) {
  return Vector<S>(Index<S>(x) & mask);
}

// Whether the mask is set in all lanes.
template <typename S>
ADAHESSIAN_HD bool all(Index<S> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_movepi32_mask(__m512i(mask)) == 0xFFFF;
  if constexpr (sizeof(S) == 8) return _mm512_movepi64_mask(__m512i(mask)) == 0xFF;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(__m256(mask)) == 0xFF;
#elif defined(__SSE2__)
  return _mm_movemask_ps(__m128(mask)) == 0xF;
#else
  bool set = true;
  for (int l = 0; l < kLanes<S>; ++l) set &= mask[l] != 0;
  return set;
#endif
}

// Whether all lanes, of which none is below zero, are positive and finite.
template <typename S>
ADAHESSIAN_HD bool all_positive(Vector<S> x) {
#if defined(__AVX512F__)
  constexpr int kOthers = 0x9F;  // zero, infinity, NaN
  if constexpr (sizeof(S) == 4) return _mm512_fpclass_ps_mask(__m512(x), kOthers) == 0;
  if constexpr (sizeof(S) == 8) return _mm512_fpclass_pd_mask(__m512d(x), kOthers) == 0;
#else
  return all<S>(x > x - x);  // which is NaN for infinity
#endif
}

// 16-bit numbers to 32-bit lanes and back. The compiler's own conversions take twice the instructions.
ADAHESSIAN_HD Bits<float> widened(Halves halves) {
#if defined(__AVX512F__)
  return Bits<float>(_mm512_cvtepu16_epi32(__m256i(halves)));
#elif defined(__AVX2__)
  return Bits<float>(_mm256_cvtepu16_epi32(__m128i(halves)));
#else
  return __builtin_convertvector(halves, Bits<float>);
#endif
}
ADAHESSIAN_HD Halves narrowed(Bits<float> numbers) {
#if defined(__AVX512F__)
  return Halves(_mm512_cvtepi32_epi16(__m512i(numbers)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(__m256i(numbers), __m256i(numbers));
  return Halves(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(numbers, Halves);
#endif
}

// A vector of elements of type T from and to memory, computed on in the type of their states.
template <typename T>
ADAHESSIAN_HD Vector<StateOf<T>> load_as_vector(const T* from) {
  if constexpr (sizeof(T) == 2) {
    return Codec<T>::template decode<Vector<float>>(widened(load_vector<Halves>(from)));
  } else {
    return load_vector<Vector<T>>(from);
  }
}
template <typename T>
ADAHESSIAN_HD void store_as_vector(T* to, Vector<StateOf<T>> vector) {
  if constexpr (sizeof(T) == 2) {
    store_vector(to, narrowed(Codec<T>::template encode<Bits<float>>(vector)));
  } else {
    store_vector(to, vector);
  }
}

// Lanes `shift` ... `shift + W - 1` of a and b laid end to end.
template <int shift, typename V, size_t... lane>
ADAHESSIAN_HD V shifted(V a, V b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, (int(lane) + shift)...);
}
template <typename S, int shift>
ADAHESSIAN_HD Vector<S> shifted(Vector<S> a, Vector<S> b) {
  return shifted<shift>(a, b, std::make_index_sequence<kLanes<S>>());
}

// The first (half = 0) or second half of a0, b0, a1, b1, ...
template <int half, typename V, size_t... lane>
ADAHESSIAN_HD V interleaved(V a, V b, std::index_sequence<lane...>) {
  constexpr int W = sizeof...(lane);
  return __builtin_shufflevector(a, b, (half * W / 2 + int(lane) / 2 + int(lane) % 2 * W)...);
}
template <int half, typename V>
ADAHESSIAN_HD V interleaved(V a, V b) {
  return interleaved<half>(a, b, std::make_index_sequence<sizeof(V) / sizeof(a[0])>());
}

// Sums of neighbours: a0 + a1, a2 + a3, ..., b0 + b1, ...
template <typename V, size_t... lane>
ADAHESSIAN_HD V add_pairs(V a, V b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, (2 * int(lane))...) + __builtin_shufflevector(a, b, (2 * int(lane) + 1)...);
}

// Lane l of the result is the sum of the lanes of rows[l]. Destroys the rows.
template <typename S>
ADAHESSIAN_HD Vector<S> sum_of_each(Vector<S>* rows) {
  for (int count = kLanes<S>; count > 1; count /= 2) {
    for (int r = 0; r < count / 2; ++r)
      rows[r] = add_pairs(rows[2 * r], rows[2 * r + 1], std::make_index_sequence<kLanes<S>>());
  }
  return rows[0];
}

// Lane l of the result is lane index[l] of a and b laid end to end.
template <typename S>
ADAHESSIAN_HD Vector<S> pick(Vector<S> a, Vector<S> b, Index<S> index) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(a, b, index);
#else
  Vector<S> picked;
  for (int l = 0; l < kLanes<S>; ++l) picked[l] = index[l] < kLanes<S> ? a[index[l]] : b[index[l] - kLanes<S>];
  return picked;
#endif
}

// Lanes cut at +-limit; NaN stays.
template <typename S>
ADAHESSIAN_HD Vector<S> cut(Vector<S> x, S limit) {
  const Vector<S> high = Vector<S>{} + limit, low = -high;
#if defined(__AVX512F__)  // of two numbers of which one is NaN, the instructions return the second
  if constexpr (sizeof(S) == 4) return Vector<S>(_mm512_max_ps(__m512(low), _mm512_min_ps(__m512(high), __m512(x))));
  if constexpr (sizeof(S) == 8) return Vector<S>(_mm512_max_pd(__m512d(low), _mm512_min_pd(__m512d(high), __m512d(x))));
#else
  x = high < x ? high : x;
  return low > x ? low : x;
#endif
}

template <typename S>
ADAHESSIAN_HD Vector<S> square_root(Vector<S> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return Vector<S>(_mm512_sqrt_ps(__m512(x)));
  if constexpr (sizeof(S) == 8) return Vector<S>(_mm512_sqrt_pd(__m512d(x)));
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return Vector<S>(_mm256_sqrt_ps(__m256(x)));
  if constexpr (sizeof(S) == 8) return Vector<S>(_mm256_sqrt_pd(__m256d(x)));
#elif defined(__SSE2__)
  if constexpr (sizeof(S) == 4) return Vector<S>(_mm_sqrt_ps(__m128(x)));
  if constexpr (sizeof(S) == 8) return Vector<S>(_mm_sqrt_pd(__m128d(x)));
#else
  for (int l = 0; l < kLanes<S>; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}
// The 64-bit products of the even lanes.
ADAHESSIAN_HD Bits<double> multiply_even(Bits<float> a, Bits<float> b) {
#if defined(__AVX512F__)
  return Bits<double>(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return Bits<double>(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
  return Bits<double>(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (Bits<double>(a) & 0xFFFFFFFFu) * (Bits<double>(b) & 0xFFFFFFFFu);
#endif
}
template <typename S>
ADAHESSIAN_HD Vector<S> power(Vector<S> x, S k) {
  for (int l = 0; l < kLanes<S>; ++l) x[l] = std::pow(x[l], k);
  return x;
}

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu

namespace adahessian {

template <>
struct Product<cpu::Bits<float>> {
  using U = cpu::Bits<float>;
  using Wide = cpu::Bits<double>;
  U high, low;
  ADAHESSIAN_MEMBER static Product of(uint32_t a, U b) {
    const Wide even = cpu::multiply_even(U{} + a, b), odd = cpu::multiply_even(U{} + a, U(Wide(b) >> 32));
    const Wide upper = Wide{} + 0xFFFFFFFF00000000u;  // the odd lanes, little-endian
    return {U((even >> 32) | (odd & upper)), U((even & ~upper) | (odd << 32))};
  }
};

// The same in the lower halves of 64-bit lanes, where nothing has to be put together again. What the upper halves of
// the factor and of the product's parts hold does not matter.
template <>
struct Product<cpu::Bits<double>> {
  using U = cpu::Bits<double>;
  U high, low;
  ADAHESSIAN_MEMBER static Product of(uint32_t a, U b) {
    const U product = cpu::multiply_even(cpu::Bits<float>(U{} + a), cpu::Bits<float>(b));
    return {product >> 32, product};
  }
};

template <>
struct Functions<cpu::Vector<float>> {
  ADAHESSIAN_MEMBER static cpu::Vector<float> square_root(cpu::Vector<float> x) { return cpu::square_root<float>(x); }
  ADAHESSIAN_MEMBER static cpu::Vector<float> power(cpu::Vector<float> x, float k) { return cpu::power<float>(x, k); }
};
template <>
struct Functions<cpu::Vector<double>> {
  ADAHESSIAN_MEMBER static cpu::Vector<double> square_root(cpu::Vector<double> x) {
    return cpu::square_root<double>(x);
  }
  ADAHESSIAN_MEMBER static cpu::Vector<double> power(cpu::Vector<double> x, double k) {
    return cpu::power<double>(x, k);
  }
};

}  // namespace adahessian
