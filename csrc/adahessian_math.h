// The maths of AdaHessian (Yao et al. 2021, Algorithm 1) for one element, and the Philox generator behind the
// Rademacher probe. Host and device compile the same lines; adahessian_fused/reference.py is the specification.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ADAHESSIAN_HD __host__ __device__ __forceinline__
#else
// Internal linkage and always inlined: the callers are compiled once for each instruction set.
#define ADAHESSIAN_HD static inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define ADAHESSIAN_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define ADAHESSIAN_UNROLL  // nvcc's host pass
#else
#define ADAHESSIAN_UNROLL _Pragma("GCC unroll 10")
#endif

namespace adahessian {

// ---- Rademacher probe -----------------------------------------------------------------------------------------------

// One Philox call is 128 bits, the signs of 128 consecutive elements of a parameter.
constexpr int kSignsPerCall = 128;

struct PhiloxWords {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al. 2011).
ADAHESSIAN_HD PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  ADAHESSIAN_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t next0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c0 = next0;
    c1 = uint32_t(product1);
    c2 = next2;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Identifies the probe of one parameter: everything but the element's index.
struct ProbeKey {
  uint64_t seed;
  uint32_t param_id;
  uint32_t hessian_step;
  uint32_t sample;
};

// The signs of logical elements 128 * call ... 128 * call + 127. Element l reads bit l % 32 of word (l / 32) % 4;
// a set bit means -1.
ADAHESSIAN_HD PhiloxWords rademacher_words(const ProbeKey& key, uint32_t call) {
  return philox4x32(call, key.param_id, key.hessian_step, key.sample, uint32_t(key.seed), uint32_t(key.seed >> 32));
}

// ---- the update -----------------------------------------------------------------------------------------------------

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, hessian_power, maximize;  // the columns of the hyperparameter table
};

enum class Power { kOne, kHalf, kGeneral };  // k = 1 and k = 1/2 need no pow()

// What the update of an element needs, the same for all elements of a parameter.
template <typename S>
struct Coefficients {
  S beta1, one_minus_beta1, beta2, one_minus_beta2;
  S decay;           // 1 - lr * weight_decay
  S step_size;       // lr / (1 - beta1^t)
  S inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^h)
  S eps, power;
  S grad_factor;     // -1 to maximize; divided by grad_scale
  S hessian_factor;  // 1 / grad_scale
  Power kind;
  bool moves;  // false until the parameter has seen curvature (h = 0)
};

// t: this step's number, from 1; h: Hessian updates including this step's; inv_scale: 1 / grad_scale.
template <typename S>
ADAHESSIAN_HD Coefficients<S> coefficients(const Hyper& hyper, int64_t t, int64_t h, double inv_scale) {
  Coefficients<S> c;
  c.beta1 = S(hyper.beta1);
  c.one_minus_beta1 = S(1.0 - hyper.beta1);
  c.beta2 = S(hyper.beta2);
  c.one_minus_beta2 = S(1.0 - hyper.beta2);
  c.decay = S(1.0 - hyper.lr * hyper.weight_decay);
  c.step_size = S(hyper.lr / (1.0 - pow(hyper.beta1, double(t))));
  c.inv_sqrt_bias2 = S(h > 0 ? 1.0 / sqrt(1.0 - pow(hyper.beta2, double(h))) : 0.0);
  c.eps = S(hyper.eps);
  c.power = S(hyper.hessian_power);
  c.grad_factor = S(hyper.maximize != 0.0 ? -inv_scale : inv_scale);
  c.hessian_factor = S(inv_scale);
  c.kind = hyper.hessian_power == 1.0 ? Power::kOne : hyper.hessian_power == 0.5 ? Power::kHalf : Power::kGeneral;
  c.moves = h > 0;
  return c;
}

ADAHESSIAN_HD float square_root(float x) { return sqrtf(x); }
ADAHESSIAN_HD double square_root(double x) { return sqrt(x); }
ADAHESSIAN_HD float power_of(float x, float k) { return powf(x, k); }
ADAHESSIAN_HD double power_of(double x, double k) { return pow(x, k); }

// m <- beta1 m + (1 - beta1) g
template <typename S>
ADAHESSIAN_HD S update_exp_avg(S m, S g, const Coefficients<S>& c) {
  return c.beta1 * m + c.one_minus_beta1 * (c.grad_factor * g);
}

// v <- beta2 v + (1 - beta2) Ds^2
template <typename S>
ADAHESSIAN_HD S update_exp_hessian_diag_sq(S v, S ds, const Coefficients<S>& c) {
  const S scaled = c.hessian_factor * ds;
  return c.beta2 * v + c.one_minus_beta2 * (scaled * scaled);
}

// p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / ((sqrt(v) / sqrt(1 - beta2^h))^k + eps)        (Eq. 8, 9)
template <Power kind, typename S>
ADAHESSIAN_HD S update_param(S p, S m, S v, const Coefficients<S>& c) {
  const S root = square_root(v) * c.inv_sqrt_bias2;
  const S denom = (kind == Power::kOne    ? root
                   : kind == Power::kHalf ? square_root(root)
                                          : power_of(root, c.power)) +
                  c.eps;
  return p * c.decay - c.step_size * (m / denom);
}

}  // namespace adahessian
