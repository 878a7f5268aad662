// Host side of hessian_diag: from averaging blocks of any length to launches. adahessian_step uses it for long blocks.
#pragma once

#include "hessian_diag.h"

namespace adahessian::gpu {

// Means over blocks of `block` inputs, into `target`.
struct Reduction {
  const void* input;
  void* target;
  int64_t numel, block, period, stride;
  int64_t mean_block, mean_numel;
  ProbeRow probe;
  uint32_t constant;
  bool absolute;
  bool float_target;
};

inline Reduction reduction_of(const Segment& s, void* target, ProbeConstants& constants) {
  const int64_t block = std::min(s.block, s.numel);
  return {s.hessian,  target, s.numel, block, s.period, s.stride, block, s.numel, probe_row(s), constants.index_of(s),
          s.absolute, false};
}

template <typename T>
HessianDiagRow row_of(const Reduction& r) {
  using Row = HessianDiagRow;
  Geometry geometry = Tiler::of<T>().ordered(r.numel, r.block, r.period, r.stride);
  uint32_t flags = (r.absolute ? Row::kAbsolute : 0) | (r.float_target ? Row::kFloatTarget : 0);
  if (geometry.length == 0) {
    geometry = Tiler::one_block_each(Tiler::of<T>().inside_blocks(r.numel, r.block, r.period, r.stride));
    flags |= Row::kPartial;
  } else if (r.block == 1 && geometry.layout == Layout::kFlat && !r.float_target) {
    flags |= Row::kElementwise | (is_aligned(r.target) ? Row::kTargetAligned : 0);
  }
  if (geometry.takes_vectors(Traits<T>::kVector) && is_aligned(r.input)) flags |= Row::kHessianAligned;
  return {geometry, r.input, r.target, r.mean_block, r.mean_numel, r.probe, 0, r.constant, flags};
}

// The sum of the partial sums that a row with kPartial leaves.
inline Reduction rest_of(const Reduction& r, const HessianDiagRow& row, bool float_target) {
  Reduction rest = r;
  rest.numel = row.geometry.n_tiles();
  rest.block = r.block < r.numel ? row.geometry.tiles_per_span : rest.numel;
  rest.period = rest.stride = 1;
  rest.absolute = false;
  rest.float_target = float_target;
  return rest;
}

template <typename T, class Device>
void reduce(Device& device, HessianDiagArguments& arguments, const std::vector<Reduction>& reductions,
            const ProbeConstants& constants) {
  std::vector<HessianDiagRow> rows;
  std::vector<Reduction> rests;
  rows.reserve(reductions.size());
  int64_t n_partial = 0;
  for (const Reduction& r : reductions) {
    rows.push_back(row_of<T>(r));
    if (!(rows.back().flags & HessianDiagRow::kPartial)) continue;
    rests.push_back(rest_of(r, rows.back(), r.float_target || sizeof(StateOf<T>) == sizeof(float)));
    n_partial += rests.back().numel;
  }
  if (n_partial > 0) {
    double* partial = static_cast<double*>(device.allocate(size_t(n_partial) * sizeof(double)));
    auto rest = rests.begin();
    for (HessianDiagRow& row : rows) {
      if (!(row.flags & HessianDiagRow::kPartial)) continue;
      rest->input = row.target = partial;
      partial += rest++->numel;
    }
  }
  launch_rows<HessianDiagBody<T>>(device, arguments, rows, constants.get());
  if (n_partial == 0) return;
  arguments.probe.is_hvp = false;
  reduce<double>(device, arguments, rests, constants);
}

template <typename T, class Device>
void hessian_diag(const HessianDiagArgs& args, Device& device) {
  HessianDiagArguments arguments;
  arguments.probe = probe_source(args.probe, args.counts);
  arguments.scale = args.scale;
  arguments.accumulate = args.accumulate;
  std::vector<Reduction> reductions;
  reductions.reserve(args.segments.size());
  ProbeConstants constants(args.counts);
  for (const Segment& s : args.segments) {
    if (s.numel == 0) continue;
    reductions.push_back(reduction_of(s, static_cast<StateOf<T>*>(args.diag) + s.diag_offset, constants));
  }
  reduce<T>(device, arguments, reductions, constants);
}

}  // namespace adahessian::gpu
