// adahessian_step on the CPU: probe, block mean, moving averages and update of every segment in one pass
// (Eq. 6-9).
#include "kernels.h"
#include "long_blocks.h"
#include "tile.h"

namespace adahessian::cpu {
namespace {

template <typename T, typename M>
std::vector<StepWork<T, M>> prepare(const AdaHessianStepArgs& args) {
  using S = StateOf<T>;
  const double inv_scale = args.grad_scale ? 1.0 / double(*args.grad_scale) : 1.0;
  std::vector<StepWork<T, M>> works;
  works.reserve(args.segments.size());
  const Segment* last = nullptr;
  Coefficients<S> c;  // the last one's
  for (const Segment& s : args.segments) {
    StepWork<T, M> work{};
    work.has_curvature = args.diag != nullptr || s.hessian != nullptr;
    const int64_t* count = args.counts.steps + 2 * s.slot;
    // The pow() of the bias corrections are shared by neighbours with equal counts, that is by nearly all.
    const bool same = last != nullptr && last->group == s.group && works.back().has_curvature == work.has_curvature &&
                      std::equal(count, count + 2, args.counts.steps + 2 * last->slot);
    const Hyper& hyper = reinterpret_cast<const Hyper*>(args.groups)[s.group];
    const int64_t t = count[0] + 1, h = count[1] + work.has_curvature;
    if (!same) c = coefficients<S>(hyper, t, h, inv_scale, args.means != nullptr);
    work.c = c;
    if (args.means) work.c.pull *= S(args.means[s.slot]);
    work.probe = args.probe;
    work.key = probe_key(args.probe, s, args.counts);
    work.param = static_cast<T*>(s.param);
    work.grad = static_cast<const T*>(s.grad);
    work.exp_avg = static_cast<M*>(args.exp_avg) + s.offset;
    work.exp_hessian_diag_sq = static_cast<M*>(args.exp_hessian_diag_sq) + s.offset;
    work.master = args.master ? args.master + s.offset : nullptr;
    work.missed = args.missed ? args.missed + s.slot : nullptr;
    work.rounding_seed = args.rounding_seed;
    work.diag = args.diag ? static_cast<const S*>(args.diag) + s.diag_offset : nullptr;
    works.push_back(work);
    last = &s;
  }
  return works;
}

}  // namespace

void adahessian_step(const AdaHessianStepArgs& args, const Context& context) {
  if (args.found_inf != nullptr && *args.found_inf != 0.0f) return;
  dispatch(args.dtype, args.state_dtype, [&](auto type, auto state_type) {
    using T = decltype(type);
    using M = decltype(state_type);
    using S = StateOf<T>;
    const Tiling tiling(args.segments);
    std::vector<StepWork<T, M>> works = prepare<T, M>(args);
    std::vector<std::vector<S>> long_means;
    if (args.diag == nullptr) {
      const auto first = [](const Segment& s) { return has_long_blocks(s) && !sums_on_the_way(s); };
      long_means = long_block_means<T>(args.segments, tiling, args.probe, args.counts, context, first);
      for (size_t i = 0; i < works.size(); ++i) works[i].long_means = long_means[i].data();
    }
    const auto step = [] {
      if constexpr (std::is_same_v<M, S>)
        return kernels<T>().adahessian_step;
      else
        return kernels<T>().adahessian_step_bfloat16;
    }();
    tiling.for_each_run(context, [&](const Run& run, size_t i) { step(run, works[i]); });
  });
}

}  // namespace adahessian::cpu
