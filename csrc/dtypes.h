// The four parameter dtypes and their conversion to and from the type they are computed in, on host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "adahessian_math.h"

namespace adahessian {

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type of all arithmetic for parameters of type T, and of their states unless these are kept in bfloat16.
template <typename T>
struct State {
  using type = float;
};
template <>
struct State<double> {
  using type = double;
};
template <typename T>
using StateOf = typename State<T>::type;

template <typename To, typename From>
ADAHESSIAN_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The bits of a 16-bit number from and to float, rounding to nearest even; NaN stays NaN. F is float and U uint32_t, or
// F and U are vectors of them.
template <typename T>
struct Codec;

template <>
struct Codec<bfloat16> {
  template <typename F, typename U>
  ADAHESSIAN_MEMBER static F decode(U bits) {
    return bit_cast<F>(bits << 16);
  }
  template <typename U, typename F>
  ADAHESSIAN_MEMBER static U encode(F x) {
    const U bits = bit_cast<U>(x);
    const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const U nan = (bits >> 16) | 0x40u;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded;
  }
};

template <>
struct Codec<float16> {
  // Exponent and mantissa moved into place, then rescaled by 2^112; infinities and NaNs get the full exponent back.
  template <typename F, typename U>
  ADAHESSIAN_MEMBER static F decode(U bits) {
    const U magnitude = (bits & 0x7FFFu) << 13;
    const U scaled = bit_cast<U>(bit_cast<F>(magnitude) * 5.192296858534828e33f);
    const U special = scaled | 0x7F800000u;
    return bit_cast<F>((magnitude >= (0x7C00u << 13) ? special : scaled) | (bits & 0x8000u) << 16);
  }
  template <typename U, typename F>
  ADAHESSIAN_MEMBER static U encode(F x) {
    const U bits = bit_cast<U>(x);
    const U magnitude = bits & 0x7FFFFFFFu;
    // Normal halves: rebias the exponent by -112 and round at bit 13.
    const U normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal halves: adding 0.5 aligns the mantissa and lets the adder round.
    const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - (126u << 23);
    const U zero = bits & 0u;
    const U half = magnitude < (113u << 23) ? subnormal : normal;
    const U finite = magnitude >= (143u << 23) ? zero + 0x7C00u : half;  // 65536 and above: infinity
    return (magnitude > 0x7F800000u ? zero + 0x7E00u : finite) | ((bits >> 16) & 0x8000u);
  }
};

ADAHESSIAN_HD float load_as(float x) { return x; }
ADAHESSIAN_HD double load_as(double x) { return x; }
ADAHESSIAN_HD float load_as(bfloat16 x) { return Codec<bfloat16>::decode<float>(uint32_t(x.bits)); }
ADAHESSIAN_HD float load_as(float16 x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return Codec<float16>::decode<float>(uint32_t(x.bits));
#endif
}

// Conversion to the storage type.
ADAHESSIAN_HD void store_to(float& target, float x) { target = x; }
ADAHESSIAN_HD void store_to(double& target, double x) { target = x; }
ADAHESSIAN_HD void store_to(bfloat16& target, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(target.bits) : "f"(x));
#else
  target.bits = uint16_t(Codec<bfloat16>::encode<uint32_t>(x));
#endif
}
ADAHESSIAN_HD void store_to(float16& target, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target.bits) : "f"(x));
#else
  target.bits = uint16_t(Codec<float16>::encode<uint32_t>(x));
#endif
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

// Calls f with a value of the parameters' element type and one of the states'.
template <typename F>
void dispatch(Dtype dtype, Dtype state_dtype, const F& f) {
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (state_dtype == Dtype::kBFloat16) return f(type, bfloat16{});
    }
    f(type, StateOf<T>{});
  });
}

}  // namespace adahessian
