// The launchers without Python and torch, for sanitizers: every list of parameters with every source of curvature, and
// bit by bit the same with any number of threads. What they compute, and what else it must not depend on, is in
// tests/test_*.py.
#include "check.h"
#include "shapes.h"
#include "threads.h"

using namespace adahessian;
using namespace adahessian::test;

namespace {

const Engine kEngines[] = {
    {"cpu", cpu::rademacher, cpu::perturb, cpu::hessian_diag, cpu::adahessian_step},
    {"emulated", emulated::rademacher, emulated::perturb, emulated::hessian_diag, emulated::adahessian_step},
};

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

template <typename T, typename M>
void test_threads(const Engine& engine, const std::string& name) {
  // So many blocks longer than a tile that the CPU's step sums each of them right before it updates it.
  std::vector<Shape> shapes = {{66 * 4104 + 17, 4104}};
  for (const int64_t block : {1, 9, 127, 1024, 2049, 5000}) {
    for (const auto& list : {ragged(block), permuted(block)}) shapes.insert(shapes.end(), list.begin(), list.end());
  }
  const Options options = {.n_groups = 2, .n_slots = 3};
  Problem<T, M> expected(shapes, options);
  expected.run_all(engine);
  for (const int n : {2, 3, 7}) {
    Threads threads(n);
    Problem<T, M> problem(shapes, options);
    problem.context.parallel_for = [&](int64_t begin, int64_t end, int64_t grain, const auto& body) {
      threads.run(begin, end, grain, body);
    };
    problem.run_all(engine);
    check(problem.same_results(expected), name + ": the same with " + std::to_string(n) + " threads");
  }
}

template <typename T, typename M>
void test_all(const Engine& engine, const std::string& name) {
  int number = 0;
  for (const auto& shapes : all_lists()) {
    // Thread by thread takes its time: every dtype another quarter of the lists.
    if (engine.name == "cpu" || number / 2 % 4 == int(kDtype<T>)) run_list<T, M>(engine, shapes, number);
    ++number;
  }
  if (engine.name == "cpu") test_threads<T, M>(engine, name);  // emulated launches run on one thread
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
