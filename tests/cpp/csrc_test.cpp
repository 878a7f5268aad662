// The launchers without Python and torch, for sanitizers: every list of parameters with every source of curvature, and
// what results must not depend on, bit by bit: the number of threads, the order of their parts, which parameters share
// a launch, and where tensors begin in memory. What they compute is compared with the reference in tests/test_*.py.
#include <algorithm>

#include "check.h"
#include "shapes.h"
#include "threads.h"

using namespace adahessian;
using namespace adahessian::test;

namespace {

// All ops, with options that differ from list to list; some Hessian-vector products are not finite.
template <typename T, typename M>
void run_list(const Engine& engine, const std::vector<Shape>& shapes, int number) {
  Options options = {.n_groups = 1 + number % 4, .n_slots = 1 + number % 3, .shift = number % 3, .gap = number % 2 * 5};
  options.master = sizeof(T) == 2 && number % 2 == 1;
  options.with_scale = number % 4 == 3;
  using Source = typename Problem<T, M>::Source;
  for (const Source source : {Source::kHessian, Source::kDiag, Source::kNone}) {
    Problem<T, M> problem(shapes, options);
    problem.probe.is_hvp = number % 5 != 4;
    if (number % 3 == 1 && problem.hessian.size() > 1) problem.hessian[1].set(0, NAN);
    problem.run_all(engine, source);
    problem.hessian_diag(engine, 0.3, true);
    problem.perturb(engine, 0, false);
  }
}

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
  problem.run_all(engine, Problem<T, M>::Source::kDiag);
  check(problem.same_results(expected), name + ": the same by way of the compact diagonal");
}

template <typename T, typename M>
void test_all(const Engine& engine, const std::string& name) {
  int number = 0;
  for (const auto& shapes : all_lists()) {
    // Thread by thread takes its time: every dtype another quarter of the lists.
    if (engine.name == "cpu" || number / 2 % 4 == int(kDtype<T>)) run_list<T, M>(engine, shapes, number);
    ++number;
  }
  Problem<T, M> expected(mixed_for(engine), kOptions);
  expected.run_all(engine);
  if (engine.name == "cpu") {  // emulated launches run on one thread
    test_threads(engine, expected, name);
    test_order(engine, expected, name);
  }
  test_one_at_a_time(engine, expected, name);
  test_alignment(engine, expected, name);
  test_compact_diagonal(engine, expected, name);
}

}  // namespace

int main(int count, char** names) {
  for (const Engine& engine : kEngines) {
    if (count > 1 && names[1] != engine.name) continue;
    for_each_storage([&](auto type, auto state_type, const std::string& dtype) {
      test_all<decltype(type), decltype(state_type)>(engine, engine.name + ", " + dtype);
    });
  }
  return report();
}
