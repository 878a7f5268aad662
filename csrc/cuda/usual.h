// Device side: the arithmetic of usual elements, where it differs from what the rules for all of them take.
#pragma once

#include "memory.h"

namespace adahessian::gpu {

// Whether all numbers that were looked at are positive and below a limit, by their bits, one instruction each. NaNs,
// negative numbers and zeros are not.
template <typename S>
class Positive {
 public:
  ADAHESSIAN_MEMBER void look_at(S x) { all_ &= x > S(0) && x < S(INFINITY); }
  ADAHESSIAN_MEMBER bool below(uint32_t) const { return all_; }

 private:
  bool all_ = true;
};

template <>
class Positive<float> {
 public:
  ADAHESSIAN_MEMBER void look_at(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
#ifdef __CUDA_ARCH__
    greatest_ = __viaddmax_u32(bits, 0xFFFFFFFFu, greatest_);
#else
    greatest_ = bits - 1 > greatest_ ? bits - 1 : greatest_;
#endif
  }
  // limit: the bits of the first number that is not below.
  ADAHESSIAN_MEMBER bool below(uint32_t limit) const { return greatest_ < limit - 1; }

 private:
  uint32_t greatest_ = 0;
};

// The greatest magnitude that was looked at, as bits: above all others where there was a NaN.
class Magnitude {
 public:
  ADAHESSIAN_MEMBER void look_at(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(greatest_) : "f"(fabsf(x)));
#else
    const uint32_t bits = bit_cast<uint32_t>(x) & 0x7FFFFFFFu;
    if (bits > bit_cast<uint32_t>(greatest_)) greatest_ = bit_cast<float>(bits);
#endif
  }
  ADAHESSIAN_MEMBER bool below(uint32_t limit) const { return bit_cast<uint32_t>(greatest_) < limit; }

 private:
  float greatest_ = 0;
};

// x, cut at +-bound; NaN stays NaN.
ADAHESSIAN_HD float cut(float x, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  asm("min.NaN.xorsign.abs.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));
  return x;
#else
  return x > bound ? bound : x < -bound ? -bound : x;
#endif
}
ADAHESSIAN_HD double cut(double x, double bound) { return x > bound ? bound : x < -bound ? -bound : x; }

// Quotient and square root that are wrong by two units in the last place of float: where the result has 8 or 11 bits,
// IEEE's cost 20 instructions more and change nothing but ties.
struct Rough {
  ADAHESSIAN_MEMBER static float square_root(float x) {
#ifdef __CUDA_ARCH__
    asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    return sqrtf(x);
#endif
  }
  ADAHESSIAN_MEMBER static float divide(float a, float b) {
#ifdef __CUDA_ARCH__
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(b));
    return a * b;
#else
    return a / b;
#endif
  }
};

template <typename S>
struct Exact {
  ADAHESSIAN_MEMBER static S square_root(S x) { return Functions<S>::square_root(x); }
  ADAHESSIAN_MEMBER static S divide(S a, S b) { return a / b; }
};

}  // namespace adahessian::gpu
