// The maths of AdaHessian (Yao et al. 2021, Algorithm 1) for one element, and the Philox generator behind the
// Rademacher probe and the rounding of states. Host and device compile the same lines; adahessian_fused/reference.py is
// the specification.
#pragma once

#include <cmath>
#include <cstdint>

// Functions, and member functions, for host and device. On the host always inlined: the callers are compiled once for
// each instruction set and must not share a copy.
#if defined(__CUDACC__)
#define ADAHESSIAN_HD __host__ __device__ __forceinline__
#define ADAHESSIAN_MEMBER __host__ __device__ __forceinline__
#else
#define ADAHESSIAN_HD static inline __attribute__((always_inline))
#define ADAHESSIAN_MEMBER inline __attribute__((always_inline))
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

// The two halves of 32 x 32-bit products: here of one number; the CPU kernels add vectors.
template <typename U>
struct Product {
  U high, low;
  ADAHESSIAN_MEMBER static Product of(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return {__umulhi(a, b), a * b};
#else
    const uint64_t product = uint64_t{a} * b;
    return {uint32_t(product >> 32), uint32_t(product)};
#endif
  }
};

template <typename U>
struct PhiloxWords {
  U word[4];
};

// The keys of Philox's rounds.
struct PhiloxKeys {
  uint32_t k0, k1;
  ADAHESSIAN_MEMBER uint32_t first(int round) const { return k0 + uint32_t(round) * 0x9E3779B9u; }
  ADAHESSIAN_MEMBER uint32_t second(int round) const { return k1 + uint32_t(round) * 0xBB67AE85u; }
};

// Philox4x32 (Salmon et al. 2011); U is uint32_t or a vector of them, for several counters at once.
template <typename U, int rounds = 10, class Keys>
ADAHESSIAN_HD PhiloxWords<U> philox4x32(U c0, U c1, U c2, U c3, const Keys& keys) {
  ADAHESSIAN_UNROLL
  for (int round = 0; round < rounds; ++round) {
    const Product<U> product0 = Product<U>::of(0xD2511F53u, c0), product1 = Product<U>::of(0xCD9E8D57u, c2);
    c0 = product1.high ^ c1 ^ keys.first(round);
    c1 = product1.low;
    c2 = product0.high ^ c3 ^ keys.second(round);
    c3 = product0.low;
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
template <typename U>
ADAHESSIAN_HD PhiloxWords<U> rademacher_words(const ProbeKey& key, U call) {
  const U zero = call ^ call;
  return philox4x32<U>(call, zero + key.param_id, zero + key.hessian_step, zero + key.sample,
                       PhiloxKeys{uint32_t(key.seed), uint32_t(key.seed >> 32)});
}

// ---- stochastic rounding of states ---------------------------------------------------------------------------------

// One Philox call is 128 bits, 16 for each of 8 consecutive elements of a parameter, in storage order.
constexpr int kRoundingsPerCall = 8;

// Seven rounds pass every test of randomness that ten do (Salmon et al. 2011, Table 2).
constexpr int kRoundingRounds = 7;

// Identifies the rounding of one parameter's states at one step: everything but the element's index.
struct RoundingKey {
  uint64_t seed;
  uint32_t param_id;
  uint32_t step;  // t, from 1
  ADAHESSIAN_MEMBER PhiloxKeys keys() const { return {uint32_t(seed), uint32_t(seed >> 32)}; }
};

// The bits of stored elements 8 * call ... 8 * call + 7, two to a word, the lower half first. The last word of the
// counter is one that no sample of a probe has.
template <typename U, class Key>
ADAHESSIAN_HD PhiloxWords<U> rounding_words(const Key& key, U call) {
  const U zero = call ^ call;
  return philox4x32<U, kRoundingRounds>(call, zero + key.param_id, zero + key.step, zero + 0xFFFFFFFFu, key.keys());
}

// v is rounded by the same 16 bits as m, with their bytes exchanged: as uniform, and dependent on m's rounding only
// where the first byte leaves it open.
template <typename U>
ADAHESSIAN_HD U swap_bytes(U bits) {
  return (bits & 0xFFu) << 8 | bits >> 8;
}

constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kRoundsToInfinity = 0x7F7F0000u;  // if it is finite itself

// The bits of a float for its upper half to be the number in bfloat16: away from zero if the half that is cut off, plus
// 16 random bits, carries, so that the mean is the float itself. A finite number stays finite: one beyond bfloat16's
// largest is cut off. What arithmetic gives as NaN has its quiet bit in the upper half.
template <typename U>
ADAHESSIAN_HD U round_stochastically(U word, U bits) {
  return (word & 0x7FFFFFFFu) < kRoundsToInfinity ? word + bits : word;
}

// ---- the update -----------------------------------------------------------------------------------------------------

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, hessian_power, maximize;  // the columns of the hyperparameter table
  double holds = 0, clip = INFINITY, shrink = 0, nesterov = 0, cautious = 0;
};

// What an update has to do: k = 1 and k = 1/2 need no pow(), and in the plain one, of k = 1, nothing is cut and no
// v_hat drawn to a mean.
enum class Power { kPlain, kOne, kHalf, kGeneral };

// What the update of an element needs, the same for all elements of a parameter.
template <typename S>
struct Coefficients {
  S beta1, one_minus_beta1, beta2, one_minus_beta2;
  S decay;        // 1 - lr * weight_decay
  S step_size;    // lr / (1 - beta1^t), with Nesterov's momentum t + 1
  S scale, pull;  // v_hat = scale v + pull: v / (1 - beta2^h), drawn to its mean over the parameter
  S eps, power;
  S held;            // the greatest v that holds its element where it is: 0, or -1 for none
  S clip;            // of numerator / denominator; infinite if there is none
  S grad_factor;     // -1 to maximize; divided by grad_scale
  S hessian_factor;  // 1 / grad_scale
  Power kind;
  bool moves;     // false until the parameter has seen curvature (h = 0)
  S nesterov;     // 1 or 0
  S stays;        // where momentum times gradient is no more, a cautious step is none: 0, or NaN where there are none
  uint32_t step;  // t
};

// t: this step's number, from 1; h: Hessian updates including this step's; inv_scale: 1 / grad_scale; has_mean: there
// is a mean to draw v_hat to, by which the caller multiplies `pull`. n is the number of Ds that v remembers.
template <typename S>
ADAHESSIAN_HD Coefficients<S> coefficients(const Hyper& hyper, int64_t t, int64_t h, double inv_scale, bool has_mean) {
  Coefficients<S> c;
  const double bias1 = 1.0 - pow(hyper.beta1, double(hyper.nesterov != 0.0 ? t + 1 : t));
  const double n = (1.0 - pow(hyper.beta2, double(h))) / (1.0 - hyper.beta2);
  const double shrink = has_mean ? hyper.shrink : 0.0;
  c.beta1 = S(hyper.beta1);
  c.one_minus_beta1 = S(1.0 - hyper.beta1);
  c.beta2 = S(hyper.beta2);
  c.one_minus_beta2 = S(1.0 - hyper.beta2);
  c.decay = S(1.0 - hyper.lr * hyper.weight_decay);
  c.step_size = S(hyper.lr / bias1);
  c.scale = S(h > 0 ? 1.0 / ((1.0 - hyper.beta2) * (n + shrink)) : 0.0);
  c.pull = S(h > 0 ? shrink / (n + shrink) : 0.0);
  c.eps = S(hyper.eps);
  c.power = S(hyper.hessian_power);
  c.held = S(hyper.holds != 0.0 && hyper.hessian_power != 0.0 ? 0.0 : -1.0);
  c.clip = S(hyper.clip * bias1);
  c.grad_factor = S(hyper.maximize != 0.0 ? -inv_scale : inv_scale);
  c.hessian_factor = S(inv_scale);
  c.kind = hyper.hessian_power == 1.0 ? Power::kOne : hyper.hessian_power == 0.5 ? Power::kHalf : Power::kGeneral;
  if (c.kind == Power::kOne && shrink == 0.0 && hyper.clip == double(INFINITY)) c.kind = Power::kPlain;
  c.moves = h > 0;
  c.nesterov = S(hyper.nesterov != 0.0);
  c.stays = S(hyper.cautious != 0.0 ? 0.0 : NAN);
  c.step = uint32_t(t);
  return c;
}

// Square root and power of what the update is computed on: here one number; the CPU kernels add vectors.
template <typename X>
struct Functions {
  ADAHESSIAN_MEMBER static float square_root(float x) { return sqrtf(x); }
  ADAHESSIAN_MEMBER static double square_root(double x) { return sqrt(x); }
  ADAHESSIAN_MEMBER static float power(float x, float k) { return powf(x, k); }
  ADAHESSIAN_MEMBER static double power(double x, double k) { return pow(x, k); }
};

// a b + c. On a GPU rounded once, here alone: of a compiler that fuses as it likes, two kernels may round differently.
template <typename X, typename S>
ADAHESSIAN_HD X multiply_add(S a, X b, X c) {
#ifdef __CUDA_ARCH__
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Eq. 9: m <- beta1 m + (1 - beta1) g, with the gradient's factor in (1 - beta1)
template <typename X, typename S>
ADAHESSIAN_HD X averaged_grad(X m, X g, const Coefficients<S>& c) {
  return multiply_add(c.beta1, m, c.one_minus_beta1 * g);
}

template <typename X, typename S>
ADAHESSIAN_HD X update_exp_avg(X m, X g, const Coefficients<S>& c) {
  return averaged_grad(m, c.grad_factor * g, c);
}

// The numerator of Eq. 9: m; with Nesterov's momentum, m after the same gradient once more (as in NAdam, Dozat 2016);
// 0 where a cautious step would go against its gradient's descent (Liang et al. 2024). g is what m has taken in.
template <typename X, typename S>
ADAHESSIAN_HD X numerator(X m, X g, const Coefficients<S>& c) {
  const X ahead = averaged_grad(m, g, c),
          x = X{} + c.nesterov > X{} ? ahead : m;  // no branch: loops would be there twice
  return x * (c.one_minus_beta1 * g) <= c.stays ? X{} : x;
}

// Ds^2, of the block means (Eq. 7) of z * Hz (Eq. 6) in cpu/block_mean.h and cuda/block_mean.h
template <typename X, typename S>
ADAHESSIAN_HD X square_of(X ds, const Coefficients<S>& c) {
  const X scaled = c.hessian_factor * ds;
  return scaled * scaled;
}

// Whether v can take Ds^2 in: not where Ds is infinite or NaN, or too large to be squared.
template <typename S, typename X>
ADAHESSIAN_HD auto is_measured(X square) {
  return square < S(INFINITY);
}

// Eq. 8: v <- beta2 v + (1 - beta2) Ds^2, where that is to be
template <typename X, typename S>
ADAHESSIAN_HD X averaged(X v, X square, const Coefficients<S>& c) {
  return multiply_add(c.beta2, v, c.one_minus_beta2 * square);
}

template <typename X, typename S>
ADAHESSIAN_HD X update_exp_hessian_diag_sq(X v, X square, const Coefficients<S>& c) {
  return is_measured<S>(square) ? averaged(v, square, c) : v;
}

// Eq. 8 and 9: sqrt(v_hat)^k + eps
template <Power kind, typename X, typename S>
ADAHESSIAN_HD X denominator(X v, const Coefficients<S>& c) {
  using F = Functions<X>;
  if (kind == Power::kPlain) return F::square_root(c.scale * v) + c.eps;
  const X root = F::square_root(multiply_add(c.scale, v, X{} + c.pull));
  if (kind == Power::kOne || (kind == Power::kGeneral && c.power == S(1))) return root + c.eps;
  return (kind == Power::kHalf ? F::square_root(root) : F::power(root, c.power)) + c.eps;
}

// Eq. 9: numerator / denominator, cut at +-clip
template <Power kind, typename X, typename S>
ADAHESSIAN_HD X quotient(X m, X denom, const Coefficients<S>& c) {
  const X q = m / denom, clip = X{} + c.clip;
  return kind == Power::kPlain ? q : q > clip ? clip : q < -clip ? -clip : q;
}

// Eq. 9: p <- p (1 - lr wd) - lr / (1 - beta1^t) * q
template <typename X, typename S>
ADAHESSIAN_HD X moved(X p, X q, const Coefficients<S>& c) {
  return multiply_add(-c.step_size, q, p * c.decay);
}

// The same, unless v has seen no curvature and holds p.
template <typename X, typename S>
ADAHESSIAN_HD X update_param(X p, X q, X v, const Coefficients<S>& c) {
  return v <= c.held ? p : moved(p, q, c);
}

}  // namespace adahessian
