// adahessian_step on the CPU: probe, block mean, moving averages and update of every segment in one pass
// (Algorithm 1, lines 5-9).
#include "tile.h"

namespace adahessian::cpu {
namespace {

// What the tiles of one segment share.
template <typename T>
struct Work {
  using S = StateOf<T>;
  Coefficients<S> c;
  Probe probe;
  ProbeKey key;
  T* param;
  const T* grad;
  S* exp_avg;
  S* exp_hessian_diag_sq;
  float* master;        // or null
  const S* diag;        // compact diagonal of the segment, or null
  const S* long_means;  // means of blocks longer than a tile, or null
  bool has_curvature;
};

// Elementwise over a strip that is contiguous in storage. `ds` is null on an off-step; its element type is T if it is
// Hz itself, the type of the states otherwise.
template <Power kind, bool has_curvature, bool has_master, typename T, typename D>
ADAHESSIAN_HD void update_strip(const Work<T>& work, int64_t stored, int64_t size, const D* __restrict ds) {
  using S = StateOf<T>;
  const Coefficients<S> c = work.c;
  T* __restrict param = work.param + stored;
  const T* __restrict grad = work.grad + stored;
  S* __restrict exp_avg = work.exp_avg + stored;
  S* __restrict exp_hessian_diag_sq = work.exp_hessian_diag_sq + stored;
  float* __restrict master = has_master ? work.master + stored : nullptr;
  for (int64_t i = 0; i < size; ++i) {
    const S m = update_exp_avg(exp_avg[i], S(load_as(grad[i])), c);
    S v = exp_hessian_diag_sq[i];
    if constexpr (has_curvature) v = update_exp_hessian_diag_sq(v, S(load_as(ds[i])), c);
    const S p = update_param<kind>(has_master ? S(master[i]) : S(load_as(param[i])), m, v, c);
    exp_avg[i] = m;
    if constexpr (has_curvature) exp_hessian_diag_sq[i] = v;
    if constexpr (has_master) master[i] = float(p);
    store_to(param[i], p);
  }
}

template <Power kind, bool has_master, typename T, typename D>
ADAHESSIAN_HD void update_strip_if_curved(const Work<T>& work, int64_t stored, int64_t size, const D* ds) {
  ds ? update_strip<kind, true, has_master>(work, stored, size, ds)
     : update_strip<kind, false, has_master>(work, stored, size, ds);
}

template <bool has_master, typename T, typename D>
ADAHESSIAN_HD void update_strip_of_kind(const Work<T>& work, int64_t stored, int64_t size, const D* ds) {
  switch (work.c.kind) {
    case Power::kOne: return update_strip_if_curved<Power::kOne, has_master>(work, stored, size, ds);
    case Power::kHalf: return update_strip_if_curved<Power::kHalf, has_master>(work, stored, size, ds);
    case Power::kGeneral: return update_strip_if_curved<Power::kGeneral, has_master>(work, stored, size, ds);
  }
}

template <typename T, typename D>
ADAHESSIAN_HD void update(const Work<T>& work, int64_t stored, int64_t size, const D* ds) {
  if (!work.c.moves) {  // no curvature so far: momentum only
    for (int64_t i = 0; i < size; ++i) {
      StateOf<T>& m = work.exp_avg[stored + i];
      m = update_exp_avg(m, StateOf<T>(load_as(work.grad[stored + i])), work.c);
    }
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (work.master != nullptr) return update_strip_of_kind<true>(work, stored, size, ds);
  }
  update_strip_of_kind<false>(work, stored, size, ds);
}

// Ds of every element of a tile, in logical order. `scratch` and `spread` hold a tile each.
template <typename T>
ADAHESSIAN_HD void tile_ds(const Tile& tile, const Work<T>& work, StateOf<T>* scratch, StateOf<T>* spread) {
  const Segment& s = *tile.segment;
  const int64_t first_block = tile.begin / s.block;
  if (s.block > kTile) {
    std::fill_n(spread, tile.size(), (work.diag ? work.diag : work.long_means)[first_block]);
  } else if (s.block == 1) {
    std::copy_n(work.diag + first_block, tile.size(), spread);
  } else if (work.diag != nullptr) {
    spread_means(work.diag + first_block, tile.size(), s.block, spread);
  } else {
    tile_d<T>(tile, work.probe, work.key, spread);
    block_means(spread, tile.size(), s.block, scratch);
    spread_means(scratch, tile.size(), s.block, spread);
  }
}

template <typename T>
ADAHESSIAN_HD void step_tile(const Tile& tile, const Work<T>& work) {
  using S = StateOf<T>;
  const Segment& s = *tile.segment;
  if (!work.has_curvature) return update(work, tile.begin, tile.size(), static_cast<const S*>(nullptr));

  S spread[kTile + kPadding], scratch[kTile + kPadding];
  if (s.block == 1 && work.diag == nullptr) {
    // D^2 = Hz^2: neither probe nor order matters, so the range is taken in storage order.
    return update(work, tile.begin, tile.size(), static_cast<const T*>(s.hessian) + tile.begin);
  }
  tile_ds(tile, work, scratch, spread);
  for_each_strip(s, tile.begin, tile.end,
                 [&](int64_t first, int64_t step, int64_t stored, int64_t size) ADAHESSIAN_INLINE_LAMBDA {
                   if (step > 1) {
                     for (int64_t n = 0; n < size; ++n) scratch[n] = spread[first + n * step];
                   }
                   update(work, stored, size, step > 1 ? scratch : spread);
                 });
}

ADAHESSIAN_CLONES void run_step(const Tile& tile, const Work<float>& work) { step_tile(tile, work); }
ADAHESSIAN_CLONES void run_step(const Tile& tile, const Work<double>& work) { step_tile(tile, work); }
ADAHESSIAN_CLONES void run_step(const Tile& tile, const Work<bfloat16>& work) { step_tile(tile, work); }
ADAHESSIAN_CLONES void run_step(const Tile& tile, const Work<float16>& work) { step_tile(tile, work); }

template <typename T>
std::vector<Work<T>> prepare(const AdaHessianStepArgs& args) {
  using S = StateOf<T>;
  const double inv_scale = args.grad_scale ? 1.0 / double(*args.grad_scale) : 1.0;
  std::vector<Work<T>> works;
  works.reserve(args.segments.size());
  const Segment* last = nullptr;
  for (const Segment& s : args.segments) {
    Work<T> work{};
    work.has_curvature = args.diag != nullptr || s.hessian != nullptr;
    const int64_t* count = args.counts.steps + 2 * s.slot;
    // The pow() of the bias corrections are shared by neighbours with equal counts, that is by nearly all.
    const bool same = last != nullptr && last->group == s.group && works.back().has_curvature == work.has_curvature &&
                      std::equal(count, count + 2, args.counts.steps + 2 * last->slot);
    const Hyper& hyper = reinterpret_cast<const Hyper*>(args.groups)[s.group];
    work.c = same ? works.back().c : coefficients<S>(hyper, count[0] + 1, count[1] + work.has_curvature, inv_scale);
    work.probe = args.probe;
    work.key = probe_key(args.probe, s, args.counts);
    work.param = static_cast<T*>(s.param);
    work.grad = static_cast<const T*>(s.grad);
    work.exp_avg = static_cast<S*>(args.exp_avg) + s.offset;
    work.exp_hessian_diag_sq = static_cast<S*>(args.exp_hessian_diag_sq) + s.offset;
    work.master = args.master ? args.master + s.offset : nullptr;
    work.diag = args.diag ? static_cast<const S*>(args.diag) + s.diag_offset : nullptr;
    works.push_back(work);
    last = &s;
  }
  return works;
}

}  // namespace

void adahessian_step(const AdaHessianStepArgs& args, const Context& context) {
  if (args.found_inf != nullptr && *args.found_inf != 0.0f) return;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using S = StateOf<T>;
    const Tiling tiling(args.segments);
    std::vector<Work<T>> works = prepare<T>(args);
    std::vector<std::vector<S>> long_means;
    if (args.diag == nullptr && any_long_block(args.segments)) {
      long_means = long_block_means<S>(args.dtype, args.segments, tiling, args.probe, args.counts, context);
      for (size_t i = 0; i < works.size(); ++i) works[i].long_means = long_means[i].data();
    }
    tiling.run(context, [&](const Tile& tile, size_t i) { run_step(tile, works[i]); });
  });
}

}  // namespace adahessian::cpu
