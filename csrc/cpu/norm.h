// What the norms' double backwards share: loops over neighbouring elements that the compiler turns into vector code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../norms.h"

// One object for every x86-64: the loader picks the loops compiled for its instruction set.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
#define ADAHESSIAN_NORM_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define ADAHESSIAN_NORM_CLONES
#endif

namespace adahessian::cpu {

constexpr int64_t kSumLanes = 16;     // running sums side by side: the order of summation is the same everywhere
constexpr int64_t kSumLength = 4096;  // elements summed up in S before the sum goes on in double
constexpr int64_t kWork = 16384;      // elements a task has at least

template <int kSums>
struct Sums {
  double value[kSums] = {};
  Sums& operator+=(const Sums& other) {
    for (int k = 0; k < kSums; ++k) value[k] += other.value[k];
    return *this;
  }
};

// Sums of the kSums numbers that terms(i, out) gives for each i < count.
template <typename S, int kSums, typename Terms>
ADAHESSIAN_HD Sums<kSums> sum_terms(int64_t count, const Terms& terms) {
  Sums<kSums> total;
  for (int64_t begin = 0; begin < count; begin += kSumLength) {
    const int64_t end = std::min(begin + kSumLength, count);
    S lanes[kSums][kSumLanes] = {};
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes) {
      for (int64_t j = 0; j < kSumLanes; ++j) {
        S term[kSums];
        terms(i + j, term);
        for (int k = 0; k < kSums; ++k) lanes[k][j] += term[k];
      }
    }
    for (int64_t j = 0; i + j < end; ++j) {
      S term[kSums];
      terms(i + j, term);
      for (int k = 0; k < kSums; ++k) lanes[k][j] += term[k];
    }
    for (int k = 0; k < kSums; ++k) {
      for (int64_t j = 0; j < kSumLanes; ++j) total.value[k] += double(lanes[k][j]);
    }
  }
  return total;
}

// Tasks of about kWork elements, each of whole units; their number does not depend on that of the threads.
struct Tasks {
  int64_t units, per_task;
  Tasks(int64_t n_units, int64_t elements_of_unit)
      : units(n_units), per_task(std::max<int64_t>(1, kWork / std::max<int64_t>(1, elements_of_unit))) {}
  int64_t count() const { return (units + per_task - 1) / per_task; }
  // body(task, first unit, unit behind the last)
  template <typename Body>
  void run(const Context& context, const Body& body) const {
    context.parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) body(t, t * per_task, std::min((t + 1) * per_task, units));
    });
  }
};

template <typename S>
const S* as(const void* data) {
  return static_cast<const S*>(data);
}

}  // namespace adahessian::cpu
