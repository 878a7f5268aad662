// The constants of a step whose counts are on the device: a kernel of its own in front of the step, a thread for each
// row of the table. Two powers in double precision are nothing that a thread of every tile should compute while all
// others wait for it, least of all on a GPU with few units for that.
#pragma once

#include "step_table.h"

namespace adahessian::gpu {

template <typename S, typename M>
struct ConstantsBody {
  using Arguments = StepArguments<S, M>;
  struct Shared {};
  struct Thread {};
  static constexpr int kBlocksPerSm = 1;
};

template <typename S, typename M, class Executor>
ADAHESSIAN_HD void run(ConstantsBody<S, M>, Executor& executor, const StepArguments<S, M>& arguments,
                       typename ConstantsBody<S, M>::Shared&, uint32_t tile) {
  executor.last([&](int thread, auto&) {
    const int i = int(tile) * kThreads + thread;
    const auto& table = arguments.table;
    if (i >= table.n_rows) return;
    const StepRow row = table.uploaded_rows != nullptr ? in_global(table.uploaded_rows)[i] : table.rows[i];
    const int64_t* steps = in_global(arguments.probe.steps) + 2 * row.probe.slot;
    const bool has_curvature = row.curvature != DiagonalSource::kNone;
    in_global(arguments.computed)[row.constant] = {
        coefficients<S>(in_global(arguments.groups)[row.group], steps[0] + 1, steps[1] + has_curvature, 1.0,
                        arguments.means != nullptr),
        {uint32_t(steps[1])}};
  });
}

// Has the constants of the rows in a table computed before the launch that reads them.
template <class Device, typename S, typename M>
void compute_constants(Device& device, const StepArguments<S, M>& arguments) {
  if (arguments.computed == nullptr) return;
  device.template launch<ConstantsBody<S, M>>(arguments, uint32_t((arguments.table.n_rows + kThreads - 1) / kThreads));
}

}  // namespace adahessian::gpu
