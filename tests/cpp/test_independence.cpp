// What results must not depend on: the number of threads, the order of their parts, which parameters share a launch,
// and where tensors begin in memory. All of it bit by bit.
#include <algorithm>

#include "check.h"
#include "shapes.h"
#include "tests.h"
#include "threads.h"

namespace adahessian::test {
namespace {

std::vector<Shape> mixed_for(const Engine& engine) {
  std::vector<Shape> shapes;
  for (const int64_t block : {1, 9, 127, 1024, 2049, 5000}) {
    for (const auto& list : {ragged(block), permuted(block)}) shapes.insert(shapes.end(), list.begin(), list.end());
  }
  if (engine.name == "cpu") shapes.push_back(many_long_blocks());
  return shapes;
}

constexpr Options kOptions = {.n_groups = 2, .n_slots = 3};

template <typename T, typename M>
void test_threads(const Engine& engine, const Problem<T, M>& expected, const std::string& name) {
  for (const int n : {2, 3, 7}) {
    Threads threads(n);
    Problem<T, M> problem(mixed_for(engine), kOptions);
    problem.context.parallel_for = [&](int64_t begin, int64_t end, int64_t grain, const auto& body) {
      threads.run(begin, end, grain, body);
    };
    problem.run_all(engine);
    check(problem.same_results(expected), name + ": the same with " + std::to_string(n) + " threads");
  }
}

// Single tiles, the last one first.
template <typename T, typename M>
void test_order(const Engine& engine, const Problem<T, M>& expected, const std::string& name) {
  Problem<T, M> problem(mixed_for(engine), kOptions);
  problem.context.parallel_for = [](int64_t begin, int64_t end, int64_t, const auto& body) {
    for (int64_t i = end; i-- > begin;) body(i, i + 1);
  };
  problem.run_all(engine);
  check(problem.same_results(expected), name + ": the same in single tiles, backwards");
}

template <typename T, typename M>
void test_one_at_a_time(const Engine& engine, const Problem<T, M>& expected, const std::string& name) {
  Problem<T, M> problem(mixed_for(engine), kOptions);
  const std::vector<Segment> all = problem.segments;
  auto param = std::move(problem.param), grad = std::move(problem.grad), hessian = std::move(problem.hessian);
  for (size_t i = 0; i < all.size(); ++i) {
    problem.segments = {all[i]};
    const auto only = [&](auto& from) {
      std::remove_reference_t<decltype(from)> one;
      one.push_back(std::move(from[i]));
      return one;
    };
    problem.param = only(param), problem.grad = only(grad), problem.hessian = only(hessian);
    problem.run_all(engine);
    param[i] = std::move(problem.param[0]);
  }
  problem.param = std::move(param);
  check(problem.same_results(expected), name + ": the same with one parameter a launch");
}

template <typename T, typename M>
void test_alignment(const Engine& engine, const Problem<T, M>& expected, const std::string& name) {
  Options options = kOptions;
  for (options.shift = 1; options.shift < 4; ++options.shift) {
    Problem<T, M> problem(mixed_for(engine), options);
    problem.run_all(engine);
    check(problem.same_results(expected), name + ": the same misaligned by " + std::to_string(options.shift));
  }
}

// hessian_diag and then a step on its result is the step on Hz.
template <typename T, typename M>
void test_compact_diagonal(const Engine& engine, const Problem<T, M>& expected, const std::string& name) {
  Problem<T, M> problem(mixed_for(engine), kOptions);
  problem.rademacher(engine);
  problem.hessian_diag(engine);
  problem.adahessian_step(engine, Problem<T, M>::Source::kDiag);
  problem.perturb(engine, 0.25, true);
  check(problem.same_results(expected), name + ": the same by way of the compact diagonal");
}

}  // namespace

void test_independence() {
  for (const Engine& engine : kEngines) {
    for_each_storage([&](auto type, auto state_type, const std::string& dtype) {
      using T = decltype(type);
      using M = decltype(state_type);
      const std::string name = engine.name + ", " + dtype;
      Problem<T, M> expected(mixed_for(engine), kOptions);
      expected.run_all(engine);
      if (engine.name == "cpu") {  // emulated launches run on one thread
        test_threads(engine, expected, name);
        test_order(engine, expected, name);
      }
      test_one_at_a_time(engine, expected, name);
      test_alignment(engine, expected, name);
      test_compact_diagonal(engine, expected, name);
    });
  }
}

}  // namespace adahessian::test
