// The update of a range of elements, vector by vector (Algorithm 1, lines 6-9), wherever their Ds come from.
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

// What the second half of a vector's update takes from the first.
template <typename S>
struct Quotient {
  Vector<S> m, denom, v;
};

// Counts the elements that v takes Ds in for, lane by lane.
template <typename S>
class Measured {
 public:
  ADAHESSIAN_MEMBER void see(Vector<S> square) { count_ = is_measured<S>(square) ? count_ + 1 : count_; }
  // The same where only the first lanes are elements.
  ADAHESSIAN_MEMBER void see(Vector<S> square, int64_t lanes) {
    count_ = (is_measured<S>(square) & (lane_numbers<S>() < Signed<S>(lanes))) ? count_ + 1 : count_;
  }
  // Adds those of `size` elements that were not to a total that other threads may be adding to.
  ADAHESSIAN_MEMBER void add_rest_of(int64_t size, int64_t* total) const {
    for (int l = 0; l < kLanes<S>; ++l) size -= count_[l];
    if (size != 0 && total != nullptr) __atomic_fetch_add(total, size, __ATOMIC_RELAXED);
  }

 private:
  Index<S> count_ = {};
};

// First half of the update of a vector of elements: its Ds^2 unless this is an off-step, and the bits that round its
// states.
template <Power kind, bool has_curvature, typename T, typename M, typename Random>
ADAHESSIAN_HD Quotient<StateOf<T>> update_states(const Arrays<T, M>& to, Vector<StateOf<T>> square,
                                                 const Coefficients<StateOf<T>>& c, Random bits) {
  using V = Vector<StateOf<T>>;
  const V m = update_exp_avg(load_as_vector(to.exp_avg), load_as_vector(to.grad), c);
  V v = load_as_vector(to.exp_hessian_diag_sq);
  if constexpr (has_curvature) v = update_exp_hessian_diag_sq(v, square, c);
  store_state(to.exp_avg, m, bits);
  if constexpr (has_curvature) store_state(to.exp_hessian_diag_sq, v, swap_bytes(bits));
  return {m, denominator<kind>(v, c), v};
}

// Second half.
template <Power kind, bool has_master, typename T, typename M>
ADAHESSIAN_HD void move_params(const Arrays<T, M>& to, Quotient<StateOf<T>> q, const Coefficients<StateOf<T>>& c) {
  using V = Vector<StateOf<T>>;
  const V update = quotient<kind>(q.m, q.denom, c);
  V p;
  if constexpr (has_master) {
    p = update_param(load_vector<V>(to.master), update, q.v, c);
    store_vector(to.master, p);
  } else {
    p = update_param(load_as_vector(to.param), update, q.v, c);
  }
  store_as_vector(to.param, p);
}

// Elements [begin, begin + size) of storage; next(i) gives Ds of elements i ... i + W - 1 of them, in turn. The second
// half of a vector's update follows the first half of the next one's: what both together wait for, square root after
// sums and quotient after root, is more than a processor looks ahead.
template <Power kind, bool has_curvature, bool has_master, typename T, typename M, typename Next>
ADAHESSIAN_HD void update_range(const StepWork<T, M>& work, int64_t begin, int64_t size, const Next& next) {
  using S = StateOf<T>;
  constexpr int64_t W = kLanes<S>;
  // Copies, which stores to the arrays cannot change.
  const Coefficients<S> c = work.c;
  const Arrays<T, M> first = {work.param, work.grad, work.exp_avg, work.exp_hessian_diag_sq, work.master};
  const auto arrays = [&](int64_t i) ADAHESSIAN_INLINE_LAMBDA {
    return Arrays<T, M>{first.param + i, first.grad + i, first.exp_avg + i, first.exp_hessian_diag_sq + i,
                        has_master ? first.master + i : nullptr};
  };
  Rounding<M> rounding = rounding_of(work);
  Measured<S> measured;
  const auto states = [&](const Arrays<T, M>& of, int64_t i, auto... lanes) ADAHESSIAN_INLINE_LAMBDA {
    const Vector<S> square = square_of(next(i), c);
    if constexpr (has_curvature) measured.see(square, lanes...);
    return update_states<kind, has_curvature>(of, square, c, rounding.from(begin + i));
  };
  int64_t i = 0;
  if (W <= size) {
    Quotient<S> quotient = states(arrays(begin), 0);
    for (i = W; i + W <= size; i += W) {
      const Quotient<S> after = states(arrays(begin + i), i);
      move_params<kind, has_master>(arrays(begin + i - W), quotient, c);
      quotient = after;
    }
    move_params<kind, has_master>(arrays(begin + i - W), quotient, c);
  }
  if (const int64_t rest = size - i; rest > 0) {  // by way of whole vectors
    T param[W] = {}, grad[W] = {};
    M exp_avg[W] = {}, exp_hessian_diag_sq[W] = {};
    float master[W] = {};
    const Arrays<T, M> from = arrays(begin + i);
    std::copy_n(from.param, rest, param);
    std::copy_n(from.grad, rest, grad);
    std::copy_n(from.exp_avg, rest, exp_avg);
    std::copy_n(from.exp_hessian_diag_sq, rest, exp_hessian_diag_sq);
    if constexpr (has_master) std::copy_n(from.master, rest, master);
    const Arrays<T, M> whole = {param, grad, exp_avg, exp_hessian_diag_sq, master};
    move_params<kind, has_master>(whole, states(whole, i, rest), c);
    std::copy_n(param, rest, from.param);
    std::copy_n(exp_avg, rest, from.exp_avg);
    std::copy_n(exp_hessian_diag_sq, rest, from.exp_hessian_diag_sq);
    if constexpr (has_master) std::copy_n(master, rest, from.master);
  }
  if constexpr (has_curvature) measured.add_rest_of(size, work.missed);
}

template <bool has_curvature, typename T, typename M, typename Next>
ADAHESSIAN_HD void update(const StepWork<T, M>& work, int64_t begin, int64_t size, const Next& next) {
  const auto with = [&]<bool has_master>() ADAHESSIAN_INLINE_LAMBDA {
    switch (work.c.kind) {
      case Power::kPlain: return update_range<Power::kPlain, has_curvature, has_master>(work, begin, size, next);
      case Power::kOne: return update_range<Power::kOne, has_curvature, has_master>(work, begin, size, next);
      case Power::kHalf: return update_range<Power::kHalf, has_curvature, has_master>(work, begin, size, next);
      case Power::kGeneral: return update_range<Power::kGeneral, has_curvature, has_master>(work, begin, size, next);
    }
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
    store_state(exp_avg, m, rounding.from(i));
    std::copy_n(exp_avg, count, work.exp_avg + i);
  }
}

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
