// Host side of adahessian_step: the table of a step and its launches.
#pragma once

#include <tuple>

#include "adahessian_step.h"
#include "constants.h"
#include "reduction.h"

namespace adahessian::gpu {

// The constants of a step. With the counts on the device they are computed there, one for each row.
template <typename S>
class StepConstants {
 public:
  explicit StepConstants(const AdaHessianStepArgs& args) : args_(args) {}

  uint32_t index_of(const Segment& s, bool has_curvature) {
    if (args_.counts.on_device) return on_device_++;
    const int64_t* counts = args_.counts.steps + 2 * s.slot;
    return constants_.index_of({s.group, counts[0], counts[1], has_curvature}, [&] {
      const Hyper& hyper = reinterpret_cast<const Hyper*>(args_.groups)[s.group];
      return StepConstant<S>{
          coefficients<S>(hyper, counts[0] + 1, counts[1] + has_curvature, 1.0, args_.means != nullptr),
          {uint32_t(counts[1])}};
    });
  }
  const std::vector<StepConstant<S>>& get() const { return constants_.get(); }

 private:
  using Key = std::tuple<int32_t, int64_t, int64_t, bool>;  // group, steps and Hessian steps so far, has_curvature
  const AdaHessianStepArgs& args_;
  uint32_t on_device_ = 0;
  DistinctConstants<Key, StepConstant<S>> constants_;
};

// A parameter's source of curvature and the tiles that suit it.
struct Choice {
  DiagonalSource curvature;
  Geometry geometry;

  Choice(const Segment& s, const void* diag, const Tiler& tiler) {
    const int64_t block = std::min(s.block, s.numel);
    const bool is_flat = s.period == 1 || s.stride == 1;
    curvature = DiagonalSource::kNone;
    geometry = tiler.flat(s.numel);
    if (s.hessian == nullptr && diag == nullptr) return;
    if (block == 1 && (diag == nullptr || is_flat)) {
      curvature = diag != nullptr ? DiagonalSource::kDiag : DiagonalSource::kElementwise;
      return;
    }
    geometry = tiler.ordered(s.numel, block, s.period, s.stride);
    curvature = diag != nullptr ? DiagonalSource::kDiagBlocks : DiagonalSource::kBlocks;
    if (geometry.length > 0) return;
    curvature = DiagonalSource::kUniform;
    geometry = block < s.numel ? tiler.inside_blocks(s.numel, block, s.period, s.stride) : tiler.flat(s.numel);
    geometry.block = block;
  }

  Order order() const {
    if (geometry.layout == Layout::kGather) return Order::kAny;
    return averages(curvature) || geometry.layout != Layout::kFlat ? Order::kLogical : Order::kFlat;
  }
};

template <typename T, typename M>
uint16_t flags_of(const AdaHessianStepArgs& args, const Segment& s, const StepRow& row) {
  if (!row.geometry.takes_vectors(Traits<T, M>::kVector)) return s.absolute ? StepRow::kAbsolute : 0;
  const bool states = is_aligned(static_cast<M*>(args.exp_avg) + s.offset) &&
                      is_aligned(static_cast<M*>(args.exp_hessian_diag_sq) + s.offset) &&
                      (args.master == nullptr || is_aligned(args.master + s.offset));
  const uint16_t aligned =
      (is_aligned(s.param) ? StepRow::kParamAligned : 0) | (is_aligned(s.grad) ? StepRow::kGradAligned : 0) |
      (is_aligned(s.hessian) ? StepRow::kHessianAligned : 0) |
      (is_aligned(row.diag) || row.curvature != DiagonalSource::kDiag ? StepRow::kDiagAligned : 0) |
      (states ? StepRow::kStateAligned : 0);
  constexpr uint16_t kEach = StepRow::kParamAligned | StepRow::kGradAligned | StepRow::kHessianAligned |
                             StepRow::kDiagAligned | StepRow::kStateAligned;
  return aligned | (aligned == kEach ? StepRow::kAllAligned : 0) | (s.absolute ? StepRow::kAbsolute : 0);
}

// Means of the averaging blocks that no tile can hold, into a workspace that the rows are told of.
template <typename T, class Device>
void average_long_blocks(const AdaHessianStepArgs& args, Device& device, std::vector<StepRow>& rows,
                         const std::vector<const Segment*>& segments) {
  using S = StateOf<T>;
  std::vector<Reduction> reductions;
  std::vector<StepRow*> waiting;
  ProbeConstants constants(args.counts);
  int64_t n_blocks = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].curvature != DiagonalSource::kUniform || args.diag != nullptr) continue;
    reductions.push_back(reduction_of(*segments[i], nullptr, constants));
    waiting.push_back(&rows[i]);
    n_blocks += (reductions.back().numel - 1) / reductions.back().block + 1;
  }
  if (reductions.empty()) return;
  S* means = static_cast<S*>(device.allocate(size_t(n_blocks) * sizeof(S)));
  for (size_t i = 0; i < reductions.size(); ++i) {
    reductions[i].target = means;
    waiting[i]->diag = means;
    means += (reductions[i].numel - 1) / reductions[i].block + 1;
  }
  HessianDiagArguments arguments;
  arguments.probe = probe_source(args.probe, args.counts);
  arguments.scale = 1.0;
  arguments.accumulate = false;
  reduce<T>(device, arguments, reductions, constants);
}

template <typename S, typename M>
StepArguments<S, M> step_arguments(const AdaHessianStepArgs& args) {
  StepArguments<S, M> arguments;
  arguments.exp_avg = static_cast<M*>(args.exp_avg);
  arguments.exp_hessian_diag_sq = static_cast<M*>(args.exp_hessian_diag_sq);
  arguments.master = args.master;
  arguments.computed = nullptr;
  arguments.groups = args.counts.on_device ? reinterpret_cast<const Hyper*>(args.groups) : nullptr;
  arguments.grad_scale = args.grad_scale;
  arguments.found_inf = args.found_inf;
  arguments.means = args.means;
  arguments.missed = args.missed;
  arguments.rounding_keys = RoundingKeys::of(args.rounding_seed);
  arguments.probe = probe_source(args.probe, args.counts);
  return arguments;
}

template <class Body, class Device>
void launch_step(Device& device, typename Body::Arguments& arguments, std::vector<StepRow>& rows,
                 const StepConstants<typename Body::S>& constants) {
  launch_rows<Body>(device, arguments, rows, constants.get(), arguments.computed,
                    [&] { compute_constants(device, arguments); });
}

template <typename T, typename M = StateOf<T>, class Device>
void adahessian_step(const AdaHessianStepArgs& args, Device& device) {
  using S = StateOf<T>;
  if (args.master != nullptr && !std::is_same_v<S, float>) {
    throw std::runtime_error("adahessian_step: master weights are given for float64 parameters; expected none");
  }
  StepConstants<S> constants(args);
  std::vector<StepRow> rows;
  std::vector<const Segment*> segments;
  std::vector<bool> gathered;
  rows.reserve(args.segments.size());
  segments.reserve(args.segments.size());
  gathered.reserve(args.segments.size());
  Order order = Order::kFlat;
  for (const Segment& s : args.segments) {
    if (s.numel == 0) continue;
    const Choice choice(s, args.diag, Tiler::of<T, M>());
    const S* diag = args.diag != nullptr ? static_cast<const S*>(args.diag) + s.diag_offset : nullptr;
    const uint32_t constant = constants.index_of(s, choice.curvature != DiagonalSource::kNone);
    rows.push_back({choice.geometry, s.param, s.grad, s.hessian, diag, s.offset, probe_row(s), uint32_t(s.group), 0,
                    constant, choice.curvature, 0});
    rows.back().flags = flags_of<T, M>(args, s, rows.back());
    segments.push_back(&s);
    gathered.push_back(choice.order() == Order::kAny);
    if (!gathered.back()) order = std::max(order, choice.order());
  }
  average_long_blocks<T>(args, device, rows, segments);
  StepArguments<S, M> arguments = step_arguments<S, M>(args);
  if (args.counts.on_device) {
    arguments.computed = static_cast<StepConstant<S>*>(device.allocate(rows.size() * sizeof(StepConstant<S>)));
  }
  // Parameters whose every place is computed have a launch of their own: it takes more registers than the others need.
  std::vector<StepRow> computed_places, others;
  for (size_t i = 0; i < rows.size(); ++i) (gathered[i] ? computed_places : others).push_back(rows[i]);
  if (order == Order::kFlat) {
    launch_step<StepBody<T, M, Order::kFlat>>(device, arguments, others, constants);
  } else {
    launch_step<StepBody<T, M, Order::kLogical>>(device, arguments, others, constants);
  }
  launch_step<StepBody<T, M, Order::kAny>>(device, arguments, computed_places, constants);
}

}  // namespace adahessian::gpu
