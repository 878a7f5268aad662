// One AdaHessian step (Eq. 6-9) of all parameters in one pass: the kernel's body.
#pragma once

#include <type_traits>

#include "hessian_diag.h"
#include "step_table.h"
#include "usual.h"

namespace adahessian::gpu {

// T: of the parameters; M: what the states are stored in.
template <typename T, typename M, Order kOrder_>
struct StepBody {
  using Param = T;
  using State = M;
  using S = StateOf<T>;
  static constexpr Order kOrder = kOrder_;
  static constexpr int kSlots = Traits<T, M>::kSlots, kVector = Traits<T, M>::kVector, kTile = Traits<T, M>::kTile;
  static constexpr bool kRounds = !std::is_same_v<M, S>;
  using Arithmetic = std::conditional_t<sizeof(T) == 2, Rough, Exact<S>>;  // of parameters, where nothing is unusual
  using Arguments = StepArguments<S, M>;
  struct NoBlocks {};
  struct Shared {
    StepRow row;
    ProbeConstant constant;
    Tile tile;
    Coefficients<S> coefficients;
    bool skip;
    std::conditional_t<kOrder != Order::kFlat, Signs<kTile>, NoBlocks> signs;
    std::conditional_t<kOrder != Order::kFlat, Blocks<S, kTile>, NoBlocks> blocks;
  };
  // What a thread carries across the barriers. 16-bit numbers stay packed until the end, so that nothing waits for them
  // early; parameters in the place of the master weights.
  struct Thread {
    Vec<T, kVector> grad[kSlots];
    Vec<M, kVector> exp_avg[kSlots], exp_hessian_diag_sq[kSlots];
    Vec<S, kVector> weight[kSlots], d[kSlots];
  };
  static constexpr int kBlocksPerSm = sizeof(T) == sizeof(double) ? 2 : kOrder == Order::kAny ? 3 : 4;
};

// Phase 1, one thread: which tile of which parameter this is, and whether there is anything to do.
template <class Body>
ADAHESSIAN_HD void locate(const typename Body::Arguments& arguments, typename Body::Shared& shared, uint32_t tile) {
  const float found_inf = arguments.found_inf ? *arguments.found_inf : 0.0f;
  shared.row = row_of_tile(arguments.table, tile);
  if (Body::kOrder != Order::kFlat) shared.constant = constant_of_row(arguments.table, shared.row).probe;
  shared.tile = cut<Body::kVector, Body::kOrder>(shared.row.geometry, tile - shared.row.first_tile);
  shared.skip = found_inf != 0.0f;
}

template <typename S, typename M>
ADAHESSIAN_HD Coefficients<S> coefficients_of(const StepArguments<S, M>& arguments, const StepRow& row) {
  const double inv_scale = arguments.grad_scale ? 1.0 / double(*arguments.grad_scale) : 1.0;
  Coefficients<S> c = constant_of_row(arguments.table, row).coefficients;
  c.grad_factor *= S(inv_scale);
  c.hessian_factor *= S(inv_scale);
  c.one_minus_beta1 *= c.grad_factor;  // for averaged_grad
  if (arguments.means != nullptr) c.pull *= S(arguments.means[row.probe.slot]);
  return c;
}

ADAHESSIAN_HD bool takes_hessian(const StepRow& row) {
  return row.curvature == DiagonalSource::kElementwise || row.curvature == DiagonalSource::kBlocks;
}

template <typename S, typename M>
ADAHESSIAN_HD bool draws(const StepArguments<S, M>& arguments, const StepRow& row) {
  return arguments.probe.is_hvp && row.curvature == DiagonalSource::kBlocks && !(row.flags & StepRow::kAbsolute);
}

// Master weights are float, and only where the states are float too.
template <typename S>
ADAHESSIAN_HD S* as_states(float* master) {
  return reinterpret_cast<S*>(master);
}

// Calls visit for an array of T whose elements, still packed, fill the first bytes of a vector of S.
template <typename S, typename T, int n, class Visit>
ADAHESSIAN_HD void visit_packed(Vec<S, n>& place, const T* array, bool aligned, const Visit& visit) {
  Vec<T, n> packed;
  memcpy(&packed, &place, sizeof(packed));
  visit(packed, array, aligned);
  memcpy(&place, &packed, sizeof(packed));
}

template <typename T, typename S, int n>
ADAHESSIAN_HD void unpack(Vec<S, n>& place) {
  Vec<T, n> packed;
  memcpy(&packed, &place, sizeof(packed));
  ADAHESSIAN_UNROLL
  for (int e = 0; e < n; ++e) set(place, e, S(load_as(get(packed, e))));
}

// Calls visit(what a thread holds, array, whether it is aligned) for every array that is read.
template <class Body, class Visit>
ADAHESSIAN_HD void visit_inputs(const typename Body::Arguments& arguments, const StepRow& row,
                                typename Body::Thread& state, int i, const Visit& visit) {
  using T = typename Body::Param;
  using S = typename Body::S;
  const bool state_aligned = row.flags & StepRow::kStateAligned;
  if (takes_hessian(row)) {
    visit_packed(state.d[i], static_cast<const T*>(row.hessian), row.flags & StepRow::kHessianAligned, visit);
  } else if (row.curvature == DiagonalSource::kDiag) {
    visit(state.d[i], static_cast<const S*>(row.diag), row.flags & StepRow::kDiagAligned);
  }
  visit(state.grad[i], static_cast<const T*>(row.grad), row.flags & StepRow::kGradAligned);
  visit(state.exp_avg[i], arguments.exp_avg + row.offset, state_aligned);
  visit(state.exp_hessian_diag_sq[i], arguments.exp_hessian_diag_sq + row.offset, state_aligned);
  if (arguments.master != nullptr) {
    visit(state.weight[i], as_states<S>(arguments.master) + row.offset, state_aligned);
  } else {
    visit_packed(state.weight[i], static_cast<const T*>(row.param), row.flags & StepRow::kParamAligned, visit);
  }
}

// The same for every array that is written.
template <class Body, class Visit>
ADAHESSIAN_HD void visit_outputs(const typename Body::Arguments& arguments, const StepRow& row, bool moves,
                                 const typename Body::Thread& state,
                                 const Vec<typename Body::Param, Body::kVector>& param, int i, const Visit& visit) {
  const bool state_aligned = row.flags & StepRow::kStateAligned;
  visit(state.exp_avg[i], arguments.exp_avg + row.offset, state_aligned);
  if (row.curvature != DiagonalSource::kNone) {
    visit(state.exp_hessian_diag_sq[i], arguments.exp_hessian_diag_sq + row.offset, state_aligned);
  }
  if (arguments.master != nullptr) {
    visit(state.weight[i], as_states<typename Body::S>(arguments.master) + row.offset, state_aligned);
  }
  if (!moves && arguments.master == nullptr) return;
  visit(param, static_cast<typename Body::Param*>(row.param), row.flags & StepRow::kParamAligned);
}

// Whether every array is read and written in one access here.
template <int kVector>
ADAHESSIAN_HD bool is_whole(const StepRow& row, const Slot& slot) {
  return (row.flags & StepRow::kAllAligned) && is_full<kVector>(slot);
}

// Phase 2: every load is issued before anything waits.
template <class Body>
ADAHESSIAN_HD void load_all(const typename Body::Arguments& arguments, typename Body::Shared& shared,
                            typename Body::Thread& state, int thread) {
  using S = typename Body::S;
  constexpr Order kOrder = Body::kOrder;
  constexpr int kSlots = Body::kSlots, kVector = Body::kVector;
  const StepRow& row = shared.row;
  const Tile& tile = shared.tile;
  // Before this warp holds anything; the first warps may be drawing the probe.
  if (thread == kThreads - 1) shared.coefficients = coefficients_of(arguments, row);
  ADAHESSIAN_UNROLL
  for (int i = 0; i < kSlots; ++i) {
    const Slot slot = slot_of<kVector, kOrder>(tile, thread + i * kThreads);
    if (is_whole<kVector>(row, slot)) {
      visit_inputs<Body>(arguments, row, state, i,
                         [&](auto& vec, const auto* array, bool) { load_aligned(vec, array + slot.first); });
    } else if (kOrder == Order::kAny && tile.layout == Layout::kGather) {
      for_each_place<kVector>(tile, slot, [&](int e, int64_t index) {
        visit_inputs<Body>(arguments, row, state, i,
                           [&](auto& vec, const auto* array, bool) { set(vec, e, in_global(array)[index]); });
      });
    } else {
      visit_inputs<Body>(arguments, row, state, i, [&](auto& vec, const auto* array, bool aligned) {
        load<Order::kFlat>(vec, array, tile, slot, aligned);
      });
    }
  }
  if constexpr (kOrder != Order::kFlat) {
    if (draws(arguments, row)) draw_signs(shared.signs, arguments.probe, row.probe, shared.constant, tile, thread);
  }
  if (takes_hessian(row)) {
    ADAHESSIAN_UNROLL
    for (int i = 0; i < kSlots; ++i) unpack<typename Body::Param>(state.d[i]);
  } else if (row.curvature == DiagonalSource::kUniform) {
    const S ds = in_global(static_cast<const S*>(row.diag))[tile.first_block];
    ADAHESSIAN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      ADAHESSIAN_UNROLL
      for (int e = 0; e < kVector; ++e) set(state.d[i], e, ds);
    }
  }
}

// Phase 3, kBlocks: D = z * Hz (Eq. 6) to its logical place. kDiagBlocks: the compact diagonal's part of this tile.
template <class Body>
ADAHESSIAN_HD void fill_blocks(const typename Body::Arguments& arguments, typename Body::Shared& shared,
                               typename Body::Thread& state, int thread) {
  using S = typename Body::S;
  constexpr Order kOrder = Body::kOrder;
  const Tile& tile = shared.tile;
  if (shared.row.curvature == DiagonalSource::kDiagBlocks) {
    const auto* diag = in_global(static_cast<const S*>(shared.row.diag)) + tile.first_block;
    for (int unit = thread; unit < tile.units; unit += kThreads) value_at(shared.blocks, unit * tile.unit) = diag[unit];
    return;
  }
  constexpr int kVector = Body::kVector;
  ADAHESSIAN_UNROLL
  for (int i = 0; i < Body::kSlots; ++i) {
    const Slot slot = slot_of<kVector, kOrder>(tile, thread + i * kThreads);
    const uint32_t negative =
        draws(arguments, shared.row) ? negative_signs<kVector, kOrder>(shared.signs, tile, slot) : 0;
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const S d = get(state.d[i], e);
      set(state.d[i], e, shared.row.flags & StepRow::kAbsolute ? magnitude(d) : negative >> e & 1 ? -d : d);
    }
    scatter<kOrder>(shared.blocks, state.d[i], tile, slot);
  }
}

// Elements that v could not take Ds in for, bit e of `missed` for element e: v as it was before, which no register has
// any more, and their number.
template <class Body>
ADAHESSIAN_HD void put_back(Vec<typename Body::S, Body::kVector>& v, const typename Body::Arguments& arguments,
                            const typename Body::Shared& shared, uint32_t missed, const Slot& slot) {
  const auto* before = in_global(arguments.exp_hessian_diag_sq + shared.row.offset);
  int count = 0;
  ADAHESSIAN_UNROLL
  for (int e = 0; e < Body::kVector; ++e) {
    if (!(missed >> e & 1) || !has(slot, e)) continue;
    set(v, e, typename Body::S(load_as(before[storage_index<Body::kOrder>(shared.tile, slot, e)])));
    ++count;
  }
  if (arguments.missed != nullptr) add_atomically(arguments.missed + shared.row.probe.slot, count);
}

// States in the type that they are computed in.
template <typename S, typename M, int n>
ADAHESSIAN_HD Vec<S, n> computed(const Vec<M, n>& stored) {
  Vec<S, n> result;
  ADAHESSIAN_UNROLL
  for (int e = 0; e < n; ++e) set(result, e, S(load_as(get(stored, e))));
  return result;
}

// m and v in the type that they are stored in.
template <bool kSmall, class Body>
ADAHESSIAN_HD void keep(const typename Body::Arguments& arguments, typename Body::Shared& shared,
                        typename Body::Thread& state, const Vec<typename Body::S, Body::kVector>& m,
                        const Vec<typename Body::S, Body::kVector>& v, const Slot& slot, int i) {
  if constexpr (!Body::kRounds) {
    state.exp_avg[i] = m, state.exp_hessian_diag_sq[i] = v;
  } else {
    const RoundingKey key = {arguments.rounding_keys, shared.row.probe.param_id, shared.coefficients.step};
    const SlotBits bits = slot_bits<Body::kOrder>(key, shared.tile, slot);
    set_rounded<false, kSmall>(state.exp_avg[i], m, bits);
    set_rounded<true, kSmall>(state.exp_hessian_diag_sq[i], v, bits);
  }
}

// Parameters of usual elements, k = 1.
template <class Body, class Numerators, typename S, int n>
ADAHESSIAN_HD void move_usual(Vec<S, n>& p, const Numerators& x, const Vec<S, n>& v, const Coefficients<S>& c) {
  using F = typename Body::Arithmetic;
  ADAHESSIAN_UNROLL
  for (int e = 0; e < n; ++e) {
    const S denom = F::square_root(multiply_add(c.scale, get(v, e), c.pull)) + c.eps;
    set(p, e, moved(get(p, e), cut(F::divide(x(e), denom), c.clip), c));
    if constexpr (Body::kRounds && Body::kOrder != Order::kFlat) in_sequence();  // it takes all registers there are
  }
}

template <Power kind, class Numerators, typename S, int n>
ADAHESSIAN_HD void move(Vec<S, n>& p, const Numerators& x, const Vec<S, n>& v, const Coefficients<S>& c) {
  ADAHESSIAN_UNROLL
  for (int e = 0; e < n; ++e) {
    const S q = quotient<kind>(x(e), denominator<kind>(get(v, e), c), c);
    set(p, e, update_param(get(p, e), q, get(v, e), c));
    in_sequence();  // rare or long; several at once would cost registers
  }
}

// The last phase: m, v and the parameter of one slot (Eq. 8, 9). Where v is positive and finite afterwards, there was a
// Ds^2 to take in, if any, and nothing is held: one look at v for all the rules that are for other elements.
template <class Body>
ADAHESSIAN_HD void update_slot(const typename Body::Arguments& arguments, typename Body::Shared& shared,
                               typename Body::Thread& state, const Slot& slot, int i) {
  using S = typename Body::S;
  constexpr Order kOrder = Body::kOrder;
  constexpr int kVector = Body::kVector;
  const Coefficients<S>& c = shared.coefficients;
  Vec<S, kVector> m = computed<S>(state.exp_avg[i]), v = computed<S>(state.exp_hessian_diag_sq[i]);
  Vec<S, kVector>& p = state.weight[i];
  const bool has_curvature = shared.row.curvature != DiagonalSource::kNone;
  if (has_curvature) {
    if constexpr (kOrder != Order::kFlat) {
      if (averages(shared.row.curvature)) gather<kOrder>(state.d[i], shared.blocks, shared.tile, slot);
    }
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) {
      set(state.d[i], e, square_of(get(state.d[i], e), c));
      set(v, e, averaged(get(v, e), get(state.d[i], e), c));
    }
  }
  ADAHESSIAN_UNROLL
  for (int e = 0; e < kVector; ++e) {
    set(m, e, averaged_grad(get(m, e), S(load_as(get(state.grad[i], e))), c));
  }
  // The numerators of Eq. 9, where the fewest registers hold what they are made of: in the gradient's place, or late.
  [[maybe_unused]] Vec<S, kVector> x;
  const auto numerator_of = [&](int e) { return numerator(get(m, e), S(load_as(get(state.grad[i], e))), c); };
  if constexpr (!Body::kRounds) {
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) set(x, e, numerator_of(e));
  }
  const auto x_of = [&](int e) {
    if constexpr (Body::kRounds) return numerator_of(e);
    return get(x, e);
  };
  constexpr uint32_t kLimit = Body::kRounds ? kRoundsToInfinity : kInfinity;
  Positive<S> of_v;
  ADAHESSIAN_UNROLL
  for (int e = 0; e < kVector; ++e) of_v.look_at(get(v, e));
  bool usual = c.moves && (c.kind == Power::kPlain || c.kind == Power::kOne) && of_v.below(kLimit);
  if constexpr (Body::kRounds) {
    Magnitude of_m;
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) of_m.look_at(get(m, e));
    usual &= of_m.below(kLimit);
  }
  if (usual) {
    if (arguments.master == nullptr) unpack<typename Body::Param>(p);
    move_usual<Body>(p, x_of, v, c);  // before Philox, which needs the registers
    return keep<true, Body>(arguments, shared, state, m, v, slot, i);
  }
  if (has_curvature) {
    uint32_t missed = 0;
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) missed |= is_measured<S>(get(state.d[i], e)) ? 0 : 1u << e;
    if (missed) put_back<Body>(v, arguments, shared, missed, slot);
  }
  if (arguments.master == nullptr) unpack<typename Body::Param>(p);
  if (c.moves) {
    switch (c.kind) {
      case Power::kHalf: move<Power::kHalf>(p, x_of, v, c); break;
      case Power::kPlain:
      case Power::kOne:  // no instance of its own, which would cost registers
      case Power::kGeneral: move<Power::kGeneral>(p, x_of, v, c); break;
    }
  }
  keep<false, Body>(arguments, shared, state, m, v, slot, i);
}

template <class Body>
ADAHESSIAN_HD void store_slot(const typename Body::Arguments& arguments, typename Body::Shared& shared,
                              const typename Body::Thread& state, const Slot& slot, int i) {
  using T = typename Body::Param;
  constexpr Order kOrder = Body::kOrder;
  const Tile& tile = shared.tile;
  const bool moves = shared.coefficients.moves;
  Vec<T, Body::kVector> param = {};
  ADAHESSIAN_UNROLL
  for (int e = 0; e < Body::kVector; ++e) set(param, e, stored<T>(get(state.weight[i], e)));
  if (is_whole<Body::kVector>(shared.row, slot)) {
    visit_outputs<Body>(arguments, shared.row, moves, state, param, i,
                        [&](const auto& vec, auto* array, bool) { store_aligned(array + slot.first, vec); });
  } else if (kOrder == Order::kAny && tile.layout == Layout::kGather) {
    for_each_place<Body::kVector>(tile, slot, [&](int e, int64_t index) {
      visit_outputs<Body>(arguments, shared.row, moves, state, param, i,
                          [&](const auto& vec, auto* array, bool) { in_global(array)[index] = get(vec, e); });
    });
  } else {
    visit_outputs<Body>(arguments, shared.row, moves, state, param, i, [&](const auto& vec, auto* array, bool aligned) {
      store<Order::kFlat>(array, vec, tile, slot, aligned);
    });
  }
}

template <typename T, typename M, Order kOrder, class Executor>
ADAHESSIAN_HD void run(StepBody<T, M, kOrder>, Executor& executor, const StepArguments<StateOf<T>, M>& arguments,
                       typename StepBody<T, M, kOrder>::Shared& shared, uint32_t tile) {
  using Body = StepBody<T, M, kOrder>;
  executor.phase([&](int thread, auto&) {
    if (thread == 0) locate<Body>(arguments, shared, tile);
  });
  if (shared.skip) return;
  executor.phase([&](int thread, auto& state) { load_all<Body>(arguments, shared, state, thread); });
  if constexpr (kOrder != Order::kFlat) {
    if (averages(shared.row.curvature)) {
      executor.phase([&](int thread, auto& state) { fill_blocks<Body>(arguments, shared, state, thread); });
    }
    if (shared.row.curvature == DiagonalSource::kBlocks) {
      const Lengths lengths = {shared.tile.unit, shared.tile.count};
      average_blocks(executor, shared.blocks, shared.tile, lengths);
    }
  }
  executor.last([&](int thread, auto& state) {
    ADAHESSIAN_UNROLL
    for (int i = 0; i < Body::kSlots; ++i) {
      const Slot slot = slot_of<Body::kVector, kOrder>(shared.tile, thread + i * kThreads);
      if (slot.high <= slot.low) continue;  // whole warps of a short tile
      update_slot<Body>(arguments, shared, state, slot, i);
      store_slot<Body>(arguments, shared, state, slot, i);
    }
  });
}

}  // namespace adahessian::gpu
