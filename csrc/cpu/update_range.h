// The update of a range of elements, vector by vector (Eq. 8 and 9), wherever their Ds come from.
#pragma once

#include "kernels.h"
#include "rounding.h"
#include "vector.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

// The arrays of a segment from one element of storage on.
template <typename T, typename M>
struct Arrays {
  T* param;
  const T* grad;
  M* exp_avg;
  M* exp_hessian_diag_sq;
  float* master;
};

template <typename T, typename M>
ADAHESSIAN_HD Rounding<M> rounding_of(const StepWork<T, M>& work) {
  return Rounding<M>({work.rounding_seed, work.key.param_id, work.c.step});
}

// Whether the update has no option in use but a clip, and no scale: the instance of update_range() that has to be fast.
template <typename S>
ADAHESSIAN_HD bool is_plain(const Coefficients<S>& c) {
  const bool by_root = c.kind == Power::kPlain || (c.kind == Power::kOne && c.pull == 0);
  return by_root && c.hessian_factor == 1 && (c.grad_factor == 1 || c.grad_factor == -1);
}

template <bool plain, typename S>
ADAHESSIAN_HD Vector<S> quotient_of(Vector<S> m, Vector<S> denom, const Coefficients<S>& c) {
  return plain ? cut<S>(m / denom, c.clip) : quotient<Power::kGeneral>(m, denom, c);
}

template <bool plain, typename S>
ADAHESSIAN_HD Vector<S> denominator_of(Vector<S> v, const Coefficients<S>& c) {
  if (plain) return denominator<Power::kPlain>(v, c);
  if (c.kind == Power::kHalf) return denominator<Power::kHalf>(v, c);
  return denominator<Power::kGeneral>(v, c);  // of k = 1 too
}

// Parameters as they are computed with, and back.
template <bool has_master, typename T, typename M>
ADAHESSIAN_HD Vector<StateOf<T>> load_params(const Arrays<T, M>& from) {
  if constexpr (has_master) return load_vector<Vector<StateOf<T>>>(from.master);
  return load_as_vector(from.param);
}
template <bool has_master, typename T, typename M>
ADAHESSIAN_HD void store_params(const Arrays<T, M>& to, Vector<StateOf<T>> p) {
  if constexpr (has_master) store_vector(to.master, p);
  store_as_vector(to.param, p);
}

// The update of a vector by all the rules there are; its first lanes are elements. Returns how many of them v could not
// take Ds in for.
template <bool has_curvature, bool has_master, typename T, typename M, typename Random>
[[gnu::noinline]] int64_t update_unusual(const Arrays<T, M>& to, Vector<StateOf<T>> square, Random bits,
                                         const Coefficients<StateOf<T>>& c, int64_t lanes) {
  using S = StateOf<T>;
  const Vector<S> g = c.grad_factor * load_as_vector(to.grad), m = averaged_grad(load_as_vector(to.exp_avg), g, c);
  Vector<S> v = load_as_vector(to.exp_hessian_diag_sq);
  store_state(to.exp_avg, m, bits);
  int64_t missed = 0;
  if constexpr (has_curvature) {
    v = update_exp_hessian_diag_sq(v, square, c);
    store_state(to.exp_hessian_diag_sq, v, swap_bytes(bits));
    if (!all<S>(is_measured<S>(square))) {
      for (int64_t l = 0; l < lanes; ++l) missed += !is_measured<S>(square[l]);
    }
  }
  const Vector<S> q = quotient_of<false>(numerator(m, g, c), denominator_of<false>(v, c), c);
  store_params<has_master>(to, update_param(load_params<has_master>(to), q, v, c));
  return missed;
}

// What the second half of a vector's update takes from the first.
template <typename S>
struct Quotient {
  Vector<S> numerator, denom;
};

// Elements [begin, begin + size) of storage; next(i) gives Ds of elements i ... i + W - 1 of them, in turn. The second
// half of a vector's update follows the first half of the next one's: what both together wait for, square root after
// sums and quotient after root, is more than a processor looks ahead. Where v is a positive number afterwards, there
// was a Ds^2 to take in, if any, and nothing is held: one look at v for all the rules that are for other elements.
template <bool plain, bool has_curvature, bool has_master, typename T, typename M, typename Next>
ADAHESSIAN_HD void update_range(const StepWork<T, M>& work, int64_t begin, int64_t size, const Next& next) {
  using S = StateOf<T>;
  constexpr int64_t W = kLanes<S>;
  // Copies, which stores to the arrays cannot change.
  Coefficients<S> c = work.c;
  if constexpr (plain) {
    c.one_minus_beta1 *= c.grad_factor;
    c.grad_factor = c.hessian_factor = 1;
  }
  const Arrays<T, M> first = {work.param + begin, work.grad + begin, work.exp_avg + begin,
                              work.exp_hessian_diag_sq + begin, has_master ? work.master + begin : nullptr};
  const auto arrays = [&](int64_t i) ADAHESSIAN_INLINE_LAMBDA {
    return Arrays<T, M>{first.param + i, first.grad + i, first.exp_avg + i, first.exp_hessian_diag_sq + i,
                        has_master ? first.master + i : nullptr};
  };
  Rounding<M> rounding = rounding_of(work);
  decltype(rounding.from(0)) bits;
  Vector<S> square, m, v;  // of the last vector
  // The first half; changes nothing and returns false where any element is an unusual one.
  const auto update_states = [&](int64_t i, Quotient<S>& to) ADAHESSIAN_INLINE_LAMBDA {
    const Arrays<T, M> of = arrays(i);
    square = square_of(next(i), c);
    bits = rounding.from(begin + i);
    const Vector<S> g = c.grad_factor * load_as_vector(of.grad);
    m = averaged_grad(load_as_vector(of.exp_avg), g, c);
    v = load_as_vector(of.exp_hessian_diag_sq);
    if constexpr (has_curvature) v = averaged(v, square, c);
    if (!all_positive<S>(v)) return false;
    store_state(of.exp_avg, m, bits);
    if constexpr (has_curvature) store_state(of.exp_hessian_diag_sq, v, swap_bytes(bits));
    to = {numerator(m, g, c), denominator_of<plain>(v, c)};
    return true;
  };
  // The second half.
  const auto move_params = [&](int64_t i, const Quotient<S>& from) ADAHESSIAN_INLINE_LAMBDA {
    const Arrays<T, M> of = arrays(i);
    const Vector<S> q = quotient_of<plain>(from.numerator, from.denom, c);
    store_params<has_master>(of, moved(load_params<has_master>(of), q, c));
  };
  int64_t i = 0, missed = 0;
  while (i + W <= size) {
    // Loops without a call, which keep what does not change in registers.
    const int64_t end = rounding.draw(begin + i, begin + size) - begin;
    Quotient<S> quotient, after;
    bool usual = update_states(i, quotient);
    if (usual) {
      for (i += W; i + W <= end; i += W) {
        usual = update_states(i, after);
        if (!usual) break;
        move_params(i - W, quotient);
        quotient = after;
      }
      move_params(i - W, quotient);
    }
    if (!usual) {
      if (!has_master && all<S>(v <= c.held)) {  // all are held, as in a row of an embedding that was in no batch
        const Arrays<T, M> of = arrays(i);
        store_state(of.exp_avg, m, bits);
        if constexpr (has_curvature) store_state(of.exp_hessian_diag_sq, v, swap_bytes(bits));
      } else [[unlikely]] {
        missed += update_unusual<has_curvature, has_master>(arrays(i), square, bits, work.c, W);
      }
      i += W;
    }
  }
  if (const int64_t rest = size - i; rest > 0) {  // by way of whole vectors
    T param[W] = {}, grad[W] = {};
    M exp_avg[W] = {}, exp_hessian_diag_sq[W] = {};
    float master[W] = {};
    const Arrays<T, M> from = arrays(i), whole = {param, grad, exp_avg, exp_hessian_diag_sq, master};
    std::copy_n(from.param, rest, param);
    std::copy_n(from.grad, rest, grad);
    std::copy_n(from.exp_avg, rest, exp_avg);
    std::copy_n(from.exp_hessian_diag_sq, rest, exp_hessian_diag_sq);
    if constexpr (has_master) std::copy_n(from.master, rest, master);
    rounding.draw(begin + i, begin + size);
    bits = rounding.from(begin + i);
    missed += update_unusual<has_curvature, has_master>(whole, square_of(next(i), c), bits, work.c, rest);
    std::copy_n(param, rest, from.param);
    std::copy_n(exp_avg, rest, from.exp_avg);
    std::copy_n(exp_hessian_diag_sq, rest, from.exp_hessian_diag_sq);
    if constexpr (has_master) std::copy_n(master, rest, from.master);
  }
  if (missed != 0 && work.missed != nullptr) __atomic_fetch_add(work.missed, missed, __ATOMIC_RELAXED);
}

template <bool has_curvature, typename T, typename M, typename Next>
ADAHESSIAN_HD void update(const StepWork<T, M>& work, int64_t begin, int64_t size, const Next& next) {
  const auto with = [&]<bool has_master>() ADAHESSIAN_INLINE_LAMBDA {
    if (is_plain(work.c)) return update_range<true, has_curvature, has_master>(work, begin, size, next);
    update_range<false, has_curvature, has_master>(work, begin, size, next);
  };
  if constexpr (sizeof(T) == 2) {
    if (work.master != nullptr) return with.template operator()<true>();
  }
  with.template operator()<false>();
}

// No curvature so far: momentum only.
template <typename T, typename M>
void update_momentum(const StepWork<T, M>& work, int64_t begin, int64_t size) {
  constexpr int64_t W = kLanes<StateOf<T>>;
  Rounding<M> rounding = rounding_of(work);
  for (int64_t i = begin; i < begin + size; i += W) {
    const int64_t count = std::min(W, begin + size - i);
    M exp_avg[W] = {};
    T grad[W] = {};
    std::copy_n(work.exp_avg + i, count, exp_avg);
    std::copy_n(work.grad + i, count, grad);
    const auto m = update_exp_avg(load_as_vector(exp_avg), load_as_vector(grad), work.c);
    rounding.draw(i, begin + size);
    store_state(exp_avg, m, rounding.from(i));
    std::copy_n(exp_avg, count, work.exp_avg + i);
  }
}

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
