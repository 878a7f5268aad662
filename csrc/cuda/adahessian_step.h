// One AdaHessian step (Algorithm 1, lines 6-9) of all parameters in one pass: the kernel's body.
#pragma once

#include <type_traits>

#include "hessian_diag.h"
#include "step_table.h"

namespace adahessian::gpu {

template <typename T, Order kOrder>
struct StepBody {
  using S = StateOf<T>;
  using Arguments = StepArguments<S>;
  struct NoBlocks {};
  struct Shared {
    StepRow row;
    Tile tile;
    Coefficients<S> coefficients;
    bool skip;
    std::conditional_t<kOrder != Order::kFlat, Signs<Traits<T>::kTile>, NoBlocks> signs;
    std::conditional_t<kOrder != Order::kFlat, Blocks<S, Traits<T>::kTile>, NoBlocks> blocks;
  };
  // What a thread carries across the barriers. 16-bit gradients and parameters stay packed until the end, so that
  // nothing waits for them early; parameters in the place of the master weights.
  struct Thread {
    static constexpr int kSlots = Traits<T>::kSlots, kVector = Traits<T>::kVector;
    Vec<T, kVector> grad[kSlots];
    Vec<S, kVector> weight[kSlots], exp_avg[kSlots], exp_hessian_diag_sq[kSlots], d[kSlots];
  };
  static constexpr int kBlocksPerSm = sizeof(T) == sizeof(double) ? 2 : kOrder == Order::kAny ? 3 : 4;
};

template <typename T, Order kOrder>
using StepShared = typename StepBody<T, kOrder>::Shared;
template <typename T, Order kOrder>
using StepThread = typename StepBody<T, kOrder>::Thread;

// Phase 1, one thread: which tile of which parameter this is, and whether there is anything to do.
template <typename T, Order kOrder>
ADAHESSIAN_HD void locate(const StepArguments<StateOf<T>>& arguments, StepShared<T, kOrder>& shared, uint32_t tile) {
  const float found_inf = arguments.found_inf ? *arguments.found_inf : 0.0f;
  shared.row = row_of_tile(arguments.table, tile);
  shared.tile = cut<Traits<T>::kVector, kOrder>(shared.row.geometry, tile - shared.row.first_tile);
  shared.skip = found_inf != 0.0f;
}

template <typename S>
ADAHESSIAN_HD Coefficients<S> coefficients_of(const StepArguments<S>& arguments, const StepRow& row) {
  const double inv_scale = arguments.grad_scale ? 1.0 / double(*arguments.grad_scale) : 1.0;
  if (arguments.groups != nullptr) {
    const int64_t* steps = arguments.probe.steps + 2 * row.probe.slot;
    return coefficients<S>(arguments.groups[row.group], steps[0] + 1, steps[1] + (row.curvature != Curvature::kNone),
                           inv_scale);
  }
  Coefficients<S> c = constant_of_row(arguments.table, row);
  c.grad_factor *= S(inv_scale);
  c.hessian_factor *= S(inv_scale);
  return c;
}

ADAHESSIAN_HD bool takes_hessian(const StepRow& row) {
  return row.curvature == Curvature::kElementwise || row.curvature == Curvature::kBlocks;
}

template <typename S>
ADAHESSIAN_HD bool draws(const StepArguments<S>& arguments, const StepRow& row) {
  return arguments.probe.draw && row.curvature == Curvature::kBlocks && !(row.flags & StepRow::kAbsolute);
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
template <typename T, Order kOrder, class Visit>
ADAHESSIAN_HD void visit_inputs(const StepArguments<StateOf<T>>& arguments, const StepRow& row,
                                StepThread<T, kOrder>& state, int i, const Visit& visit) {
  using S = StateOf<T>;
  const bool state_aligned = row.flags & StepRow::kStateAligned;
  if (takes_hessian(row)) {
    visit_packed(state.d[i], static_cast<const T*>(row.hessian), row.flags & StepRow::kHessianAligned, visit);
  } else if (row.curvature == Curvature::kDiag) {
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
template <typename T, Order kOrder, class Visit>
ADAHESSIAN_HD void visit_outputs(const StepArguments<StateOf<T>>& arguments, const StepRow& row, bool moves,
                                 const StepThread<T, kOrder>& state, const Vec<T, Traits<T>::kVector>& param, int i,
                                 const Visit& visit) {
  const bool state_aligned = row.flags & StepRow::kStateAligned;
  visit(state.exp_avg[i], arguments.exp_avg + row.offset, state_aligned);
  if (row.curvature != Curvature::kNone) {
    visit(state.exp_hessian_diag_sq[i], arguments.exp_hessian_diag_sq + row.offset, state_aligned);
  }
  if (arguments.master != nullptr) {
    visit(state.weight[i], as_states<StateOf<T>>(arguments.master) + row.offset, state_aligned);
  }
  if (!moves && arguments.master == nullptr) return;
  visit(param, static_cast<T*>(row.param), row.flags & StepRow::kParamAligned);
}

// Phase 2: every load is issued before anything waits.
template <typename T, Order kOrder>
ADAHESSIAN_HD void load_all(const StepArguments<StateOf<T>>& arguments, StepShared<T, kOrder>& shared,
                            StepThread<T, kOrder>& state, int thread) {
  using S = StateOf<T>;
  constexpr int kSlots = Traits<T>::kSlots, kVector = Traits<T>::kVector;
  const StepRow& row = shared.row;
  const Tile& tile = shared.tile;
  // Before this warp holds anything; the first warps may be drawing the probe.
  if (thread == kThreads - 1) shared.coefficients = coefficients_of(arguments, row);
  ADAHESSIAN_UNROLL
  for (int i = 0; i < kSlots; ++i) {
    const Slot slot = slot_of<kVector, kOrder>(tile, thread + i * kThreads);
    if (kOrder == Order::kAny && tile.layout == Layout::kGather) {
      for_each_place<kVector>(tile, slot, [&](int e, int64_t index) {
        visit_inputs<T, kOrder>(arguments, row, state, i,
                                [&](auto& vec, const auto* array, bool) { set(vec, e, in_global(array)[index]); });
      });
    } else {
      visit_inputs<T, kOrder>(arguments, row, state, i, [&](auto& vec, const auto* array, bool aligned) {
        load<Order::kFlat>(vec, array, tile, slot, aligned);
      });
    }
  }
  if constexpr (kOrder != Order::kFlat) {
    if (draws(arguments, row)) draw_signs(shared.signs, arguments.probe, row.probe, tile, thread);
  }
  if (takes_hessian(row)) {
    ADAHESSIAN_UNROLL
    for (int i = 0; i < kSlots; ++i) unpack<T>(state.d[i]);
  } else if (row.curvature == Curvature::kUniform) {
    const S ds = in_global(static_cast<const S*>(row.diag))[tile.first_block];
    ADAHESSIAN_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      ADAHESSIAN_UNROLL
      for (int e = 0; e < kVector; ++e) set(state.d[i], e, ds);
    }
  }
}

// Phase 3, kBlocks: D = z * Hz (Eq. 6) to its logical place. kDiagBlocks: the compact diagonal's part of this tile.
template <typename T, Order kOrder>
ADAHESSIAN_HD void fill_blocks(const StepArguments<StateOf<T>>& arguments, StepShared<T, kOrder>& shared,
                               StepThread<T, kOrder>& state, int thread) {
  const Tile& tile = shared.tile;
  if (shared.row.curvature == Curvature::kDiagBlocks) {
    const auto* diag = in_global(static_cast<const StateOf<T>*>(shared.row.diag)) + tile.first_block;
    for (int unit = thread; unit < tile.units; unit += kThreads) value_at(shared.blocks, unit * tile.unit) = diag[unit];
    return;
  }
  constexpr int kVector = Traits<T>::kVector;
  ADAHESSIAN_UNROLL
  for (int i = 0; i < Traits<T>::kSlots; ++i) {
    const Slot slot = slot_of<kVector, kOrder>(tile, thread + i * kThreads);
    const uint32_t negative =
        draws(arguments, shared.row) ? negative_signs<kVector, kOrder>(shared.signs, tile, slot) : 0;
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const StateOf<T> d = get(state.d[i], e);
      set(state.d[i], e, shared.row.flags & StepRow::kAbsolute ? magnitude(d) : negative >> e & 1 ? -d : d);
    }
    scatter<kOrder>(shared.blocks, state.d[i], tile, slot);
  }
}

template <Power kind, typename S, int n>
ADAHESSIAN_HD void move(Vec<S, n>& p, const Vec<S, n>& m, const Vec<S, n>& v, const Coefficients<S>& c) {
  ADAHESSIAN_UNROLL
  for (int e = 0; e < n; ++e) {
    set(p, e, update_param<kind>(get(p, e), get(m, e), get(v, e), c));
    if (kind == Power::kGeneral) in_sequence();  // pow is long; several at once would cost registers
  }
}

// The last phase: m, v and the parameter of one slot (Eq. 8, 9).
template <typename T, Order kOrder>
ADAHESSIAN_HD void update_slot(const StepArguments<StateOf<T>>& arguments, StepShared<T, kOrder>& shared,
                               StepThread<T, kOrder>& state, const Slot& slot, int i) {
  using S = StateOf<T>;
  constexpr int kVector = Traits<T>::kVector;
  const Coefficients<S>& c = shared.coefficients;
  Vec<S, kVector>&m = state.exp_avg[i], &v = state.exp_hessian_diag_sq[i], &p = state.weight[i];
  ADAHESSIAN_UNROLL
  for (int e = 0; e < kVector; ++e) {
    set(m, e, update_exp_avg(get(m, e), S(load_as(get(state.grad[i], e))), c));
  }
  if (shared.row.curvature != Curvature::kNone) {
    ADAHESSIAN_UNROLL
    for (int e = 0; e < kVector; ++e) {
      S ds = get(state.d[i], e);
      if constexpr (kOrder != Order::kFlat) {
        if (averages(shared.row.curvature))
          ds = mean_at(shared.blocks, shared.tile, logical_index<kOrder>(shared.tile, slot, e));
      }
      set(v, e, update_exp_hessian_diag_sq(get(v, e), ds, c));
    }
  }
  if (arguments.master == nullptr) unpack<T>(p);
  if (c.moves) {
    switch (c.kind) {
      case Power::kOne: move<Power::kOne>(p, m, v, c); break;
      case Power::kHalf: move<Power::kHalf>(p, m, v, c); break;
      case Power::kGeneral: move<Power::kGeneral>(p, m, v, c); break;
    }
  }
}

template <typename T, Order kOrder>
ADAHESSIAN_HD void store_slot(const StepArguments<StateOf<T>>& arguments, StepShared<T, kOrder>& shared,
                              const StepThread<T, kOrder>& state, const Slot& slot, int i) {
  const Tile& tile = shared.tile;
  const bool moves = shared.coefficients.moves;
  Vec<T, Traits<T>::kVector> param = {};
  ADAHESSIAN_UNROLL
  for (int e = 0; e < Traits<T>::kVector; ++e) set(param, e, stored<T>(get(state.weight[i], e)));
  if (kOrder == Order::kAny && tile.layout == Layout::kGather) {
    for_each_place<Traits<T>::kVector>(tile, slot, [&](int e, int64_t index) {
      visit_outputs<T, kOrder>(arguments, shared.row, moves, state, param, i,
                               [&](const auto& vec, auto* array, bool) { in_global(array)[index] = get(vec, e); });
    });
  } else {
    visit_outputs<T, kOrder>(
        arguments, shared.row, moves, state, param, i,
        [&](const auto& vec, auto* array, bool aligned) { store<Order::kFlat>(array, vec, tile, slot, aligned); });
  }
}

template <typename T, Order kOrder, class Executor>
ADAHESSIAN_HD void run(StepBody<T, kOrder>, Executor& executor, const StepArguments<StateOf<T>>& arguments,
                       StepShared<T, kOrder>& shared, uint32_t tile) {
  executor.phase([&](int thread, auto&) {
    if (thread == 0) locate<T, kOrder>(arguments, shared, tile);
  });
  if (shared.skip) return;
  executor.phase([&](int thread, auto& state) { load_all<T, kOrder>(arguments, shared, state, thread); });
  if constexpr (kOrder != Order::kFlat) {
    if (averages(shared.row.curvature)) {
      executor.phase([&](int thread, auto& state) { fill_blocks<T, kOrder>(arguments, shared, state, thread); });
    }
    if (shared.row.curvature == Curvature::kBlocks) {
      const Lengths lengths = {shared.tile.unit, shared.tile.count};
      average_blocks(executor, shared.blocks, shared.tile, lengths);
    }
  }
  executor.last([&](int thread, auto& state) {
    ADAHESSIAN_UNROLL
    for (int i = 0; i < Traits<T>::kSlots; ++i) {
      const Slot slot = slot_of<Traits<T>::kVector, kOrder>(shared.tile, thread + i * kThreads);
      update_slot<T, kOrder>(arguments, shared, state, slot, i);
      store_slot<T, kOrder>(arguments, shared, state, slot, i);
    }
  });
}

}  // namespace adahessian::gpu
