// Parameters moved along the probe, and put back.
#include "check.h"
#include "expected.h"
#include "shapes.h"
#include "tests.h"

namespace adahessian::test {
namespace {

constexpr double kScale = 0.25;  // sums with it are exact in every dtype

// Every parameter is its saved value plus scale * z.
template <typename T>
void check_moved(const Problem<T>& problem, double scale, const std::string& name) {
  Elements elements(name);
  for (size_t k = 0; k < problem.segments.size(); ++k) {
    const Segment& s = problem.segments[k];
    const auto signs = expected_signs(s, problem.probe, problem.steps[size_t(2 * s.slot + 1)]);
    for (int64_t l = 0; l < s.numel; ++l) {
      const int64_t i = storage(s, l);
      elements.equal(s.offset + i, problem.param[k][i], problem.saved[s.offset + i] + scale * signs[size_t(l)]);
    }
  }
}

template <typename T>
void test_list(const Engine& engine, const std::vector<Shape>& shapes, const std::string& name) {
  const Options options = {.n_slots = 3, .gap = 3};
  Problem<T> problem(shapes, options);
  const Problem<T> before(shapes, options);

  Array<double> expected(problem.saved.size());
  for (int64_t i = 0; i < expected.size(); ++i) expected.set(i, kUntouched);
  for (size_t k = 0; k < shapes.size(); ++k) {
    for (int64_t i = 0; i < shapes[k].numel; ++i) expected.set(before.segments[k].offset + i, before.param[k][i]);
  }
  problem.perturb(engine, kScale, true);
  Elements saved(name + ", saved");
  for (int64_t i = 0; i < expected.size(); ++i) saved.equal(i, problem.saved[i], expected[i]);
  check_moved(problem, kScale, name + ", forth");

  problem.perturb(engine, -kScale, false);
  check_moved(problem, -kScale, name + ", back and beyond");

  problem.perturb(engine, 0, false);
  check(problem.param == before.param, name + ", put back");
}

}  // namespace

void test_perturb() {
  for (const Engine& engine : kEngines) {
    for_each_dtype([&](auto type, const std::string& dtype) {
      for (const auto& shapes : {ragged(1), permuted(9), many(), {}}) {
        test_list<decltype(type)>(engine, shapes, engine.name + ", " + dtype);
      }
    });
  }
}

}  // namespace adahessian::test
