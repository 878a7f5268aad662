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

// The type of the states and of all arithmetic for parameters of type T.
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

ADAHESSIAN_HD float load_as(float x) { return x; }
ADAHESSIAN_HD double load_as(double x) { return x; }
ADAHESSIAN_HD float load_as(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

ADAHESSIAN_HD float load_as(float16 x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  // Exponent and mantissa moved into place, then rescaled by 2^112; infinities and NaNs get the full exponent back.
  const uint32_t magnitude = uint32_t(x.bits & 0x7FFFu) << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 5.192296858534828e33f);
  const uint32_t special = magnitude >= (0x7C00u << 13) ? 0x7F800000u : 0u;
  return bit_cast<float>(scaled | special | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

// Conversion to the storage type, rounding to nearest even; NaN stays NaN.
ADAHESSIAN_HD void store_to(float& target, float x) { target = x; }
ADAHESSIAN_HD void store_to(double& target, double x) { target = x; }

ADAHESSIAN_HD void store_to(bfloat16& target, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(target.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  target.bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
#endif
}

ADAHESSIAN_HD void store_to(float16& target, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal halves: rebias the exponent by -112 and round at bit 13.
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 aligns the mantissa and lets the adder round.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7C00u : half;  // 65536 and above: infinity
  half = magnitude > 0x7F800000u ? 0x7E00u : half;    // NaN
  target.bits = uint16_t(sign | half);
#endif
}

}  // namespace adahessian
