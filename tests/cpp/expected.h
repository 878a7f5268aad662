// AdaHessian (Yao et al. 2021, Algorithm 1) as plain loops in double precision, one element at a time. Shares no line
// with what it checks; tests/tolerances.py explains the error bounds.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"

namespace adahessian::test {

using Words = std::array<uint32_t, 4>;

// Philox4x32 as its authors define it (Salmon et al. 2011).
inline Words philox(Words c, std::array<uint32_t, 2> key, int rounds = 10) {
  for (int round = 0; round < rounds; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    c = {uint32_t(b >> 32) ^ c[1] ^ key[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ key[1], uint32_t(a)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return c;
}

// z of a parameter in logical order.
inline std::vector<double> expected_signs(const Segment& s, const Probe& probe, int64_t hessian_step) {
  std::vector<double> z;
  for (int64_t l = 0; l < s.numel; ++l) {
    static thread_local Words words;
    if (l % 128 == 0) {
      words = philox({uint32_t(l / 128), s.param_id, uint32_t(hessian_step), probe.sample},
                     {uint32_t(probe.seed), uint32_t(probe.seed >> 32)});
    }
    z.push_back(words[size_t(l / 32 % 4)] >> (l % 32) & 1 ? -1 : 1);
  }
  return z;
}

// Where logical element l is stored; adahessian_fused/segments.py has the formula.
inline int64_t storage(const Segment& s, int64_t l) {
  const int64_t matrix = s.period * s.stride, inside = l % matrix;
  return l - inside + inside % s.period * s.stride + inside / s.period;
}

// Block means of D = z * Hz (Eq. 6, 7), in logical order.
template <typename T, typename M>
std::vector<double> expected_means(const Problem<T, M>& problem, size_t number) {
  const Segment& s = problem.segments[number];
  const std::vector<double> z = expected_signs(s, problem.probe, problem.steps[size_t(2 * s.slot + 1)]);
  std::vector<double> means;
  for (int64_t begin = 0; begin < s.numel; begin += s.block) {
    const int64_t end = std::min(begin + s.block, s.numel);
    double sum = 0;
    for (int64_t l = begin; l < end; ++l) {
      const double d = (problem.probe.draw ? z[size_t(l)] : 1) * problem.hessian[number][storage(s, l)];
      sum += s.absolute ? std::abs(d) : d;
    }
    means.push_back(sum / double(end - begin));
  }
  return means;
}

// Unit roundoff of a type; doubled where the expected values are no more precise than the results.
template <typename S>
constexpr double kUnit = std::numeric_limits<S>::epsilon() / (sizeof(S) == 8 ? 1 : 2);

// Half a unit in the last place of a 16-bit number near x.
template <typename T>
double storage_rounding(double x) {
  if (sizeof(T) != 2) return 0;
  const bool is_half = std::is_same_v<T, float16>;
  return std::max(std::abs(x), is_half ? 0x1p-14 : 0x1p-126) * (is_half ? 0x1p-11 : 0x1p-8);
}

struct Value {
  double value, bound;
};

// The 16 bits that round m of stored element i in step t; those of v are the same with their bytes exchanged.
inline uint32_t rounding_bits(const Segment& s, uint64_t seed, int64_t t, int64_t i) {
  const Words words =
      philox({uint32_t(i / 8), s.param_id, uint32_t(t), 0xFFFFFFFFu}, {uint32_t(seed), uint32_t(seed >> 32)}, 7);
  return words[size_t(i % 8 / 2)] >> (16 * (i % 2)) & 0xFFFFu;
}

// A number after it was rounded to bfloat16 by these bits: where its own error leaves open which way, either will do.
template <typename M>
Value rounded(const Value& x, uint32_t bits) {
  if (!std::is_same_v<M, bfloat16> || x.value == 0) return x;
  const double magnitude = std::abs(x.value), ulp = std::exp2(std::max(std::floor(std::log2(magnitude)), -126.0) - 7);
  const double below = std::floor(magnitude / ulp) * ulp, fraction = (magnitude - below) / ulp, error = x.bound / ulp;
  const double carry = fraction * 65536 + bits - 65536, unsure = error * 65536 + 1;
  if (std::abs(carry) <= unsure || fraction <= error || fraction >= 1 - error) return {x.value, x.bound + ulp};
  return {std::copysign(below + (carry >= 0 ? ulp : 0), x.value), 0};
}

struct Element {
  Value m, v, weight;  // before it is rounded to the parameter's dtype
};

// One element after the step. `ds` is its block's mean of D, null on an off-step.
template <typename S>
Element expected_element(const Hyper& hyper, int64_t t, int64_t h, double unscale, double mean, double p, double g,
                         double m, double v, const double* ds) {
  constexpr double u = kUnit<S>;
  const double beta1 = hyper.beta1, beta2 = hyper.beta2, k = hyper.hessian_power;
  g *= hyper.maximize != 0 ? -unscale : unscale;
  const double m1 = beta1 * m + (1 - beta1) * g;
  const double m_error = u * (3 * beta1 * std::abs(m) + 6 * (1 - beta1) * std::abs(g));
  double v1 = v, v_error = 0, root_shift = 0;
  if (ds != nullptr && std::isfinite(*ds)) {
    const double d = *ds * unscale, e = 4 * u * std::abs(d);
    v1 = beta2 * v + (1 - beta2) * d * d;
    v_error = 8 * u * v1 + (1 - beta2) * (2 * std::abs(d) * e + e * e);
    root_shift = std::sqrt(1 - beta2) * e;
  }
  if (h == 0 || (hyper.holds != 0 && k != 0 && v1 == 0)) return {{m1, m_error}, {v1, v_error}, {p, 0}};
  const double n = (1 - std::pow(beta2, double(h))) / (1 - beta2), c = hyper.shrink;
  const double scale = 1 / ((1 - beta2) * (n + c)), pull = c / (n + c) * mean;
  const double root = std::sqrt(scale * v1 + pull), root_error = 8 * u * root + root_shift * std::sqrt(scale);
  const double power = std::pow(root, k), low = std::pow(std::max(root - root_error, 0.0), k);
  const double high = std::pow(root + root_error, k);
  const double units = k == 1 ? 0 : k == 0.5 ? 1 : 8 + k * std::abs(std::log2(std::max(root, 1e-300)));
  const double denom = power + hyper.eps;
  const double denom_error = std::max(high - power, power - low) + units * u * high + 2 * u * denom;
  const double step_size = hyper.lr / (1 - std::pow(beta1, double(t)));
  const double q_error = (m_error + std::abs(m1) / denom * denom_error) / (low + hyper.eps);
  const double bound = hyper.clip * (1 - std::pow(beta1, double(t)));
  const double update = step_size * std::clamp(m1 / denom, -bound, bound);
  const double decayed = p * (1 - hyper.lr * hyper.weight_decay);
  const double p_error = step_size * q_error + 8 * u * std::abs(update) + 4 * u * std::abs(decayed);
  return {{m1, m_error}, {v1, v_error}, {decayed - update, p_error}};
}

}  // namespace adahessian::test
