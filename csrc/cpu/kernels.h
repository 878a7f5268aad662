// The loops over the elements of a tile, compiled once for each instruction set; `kernels<T>()` are those of the best
// set this machine has. They see plain pointers only, so that no code compiled for a newer machine can end up in a
// function the rest of the library shares.
#pragma once

#include <type_traits>

#include "../launch.h"

namespace adahessian::cpu {

struct Tile;
struct Run;

// What the tiles of one segment share.
template <typename T>
struct AverageWork {
  Probe probe;
  ProbeKey key;
  StateOf<T>* diag;  // of the segment
  StateOf<T> scale;
  bool accumulate;
};

template <typename T>
struct PerturbWork {
  ProbeKey key;
  T* param;
  T* saved;
  StateOf<T> scale;  // 0: put the saved values back
  bool save;
};

// M: what m and v are stored in.
template <typename T, typename M>
struct StepWork {
  using S = StateOf<T>;
  Coefficients<S> c;
  Probe probe;
  ProbeKey key;
  T* param;
  const T* grad;
  M* exp_avg;
  M* exp_hessian_diag_sq;
  float* master;        // or null
  const S* diag;        // compact diagonal of the segment, or null
  const S* long_means;  // means of blocks longer than a tile; null if there are none or they are summed on the way
  int64_t* missed;      // or null
  uint64_t rounding_seed;
  bool has_curvature;
};

template <typename T>
struct Kernels {
  // z of a tile; `z` is the segment's.
  void (*rademacher)(const Tile& tile, const ProbeKey& key, T* z);
  // param = saved + scale * z
  void (*perturb)(const Tile& tile, const PerturbWork<T>& work);
  // Sum of D = z * Hz over a tile.
  double (*sum)(const Tile& tile, const Probe& probe, const ProbeKey& key);
  // Means over averaging blocks that are no longer than a tile.
  void (*hessian_diag)(const Tile& tile, const AverageWork<T>& work);
  // Eq. 6-9.
  void (*adahessian_step)(const Run& run, const StepWork<T, StateOf<T>>& work);
  // The same with m and v in bfloat16; null for double.
  void (*adahessian_step_bfloat16)(const Run& run, const StepWork<T, bfloat16>& work);
};

struct KernelTable {
  Kernels<float> of_float;
  Kernels<double> of_double;
  Kernels<bfloat16> of_bfloat16;
  Kernels<float16> of_float16;
};
const KernelTable& kernel_table();  // of the best instruction set

template <typename T>
const Kernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) return kernel_table().of_float;
  if constexpr (std::is_same_v<T, double>) return kernel_table().of_double;
  if constexpr (std::is_same_v<T, bfloat16>) return kernel_table().of_bfloat16;
  if constexpr (std::is_same_v<T, float16>) return kernel_table().of_float16;
}

// Of the block that begins at an element.
template <typename S>
ADAHESSIAN_HD S long_block_mean(const Segment& s, int64_t begin, double sum) {
  return S(sum / double(std::min(s.block, s.numel - begin)));
}

// out = scale * means, or out += scale * means
template <typename S>
ADAHESSIAN_HD void write_means(const S* means, int64_t count, S scale, bool accumulate, S* out) {
  if (accumulate) {
    for (int64_t i = 0; i < count; ++i) out[i] += scale * means[i];
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = scale * means[i];
  }
}

}  // namespace adahessian::cpu
