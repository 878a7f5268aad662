// The probe z of every element, and nothing outside the segments.
#include "check.h"
#include "expected.h"
#include "shapes.h"
#include "tests.h"

namespace adahessian::test {
namespace {

template <typename T>
void test_list(const Engine& engine, const std::vector<Shape>& shapes, const std::string& name) {
  Problem<T> problem(shapes, {.n_slots = 3, .gap = 3});
  problem.rademacher(engine);
  Array<double> expected(problem.z.size());
  for (int64_t i = 0; i < expected.size(); ++i) expected.set(i, kUntouched);
  for (const Segment& s : problem.segments) {
    const auto signs = expected_signs(s, problem.probe, problem.steps[size_t(2 * s.slot + 1)]);
    for (int64_t l = 0; l < s.numel; ++l) expected.set(s.offset + storage(s, l), signs[size_t(l)]);
  }
  Elements elements(name + ", z");
  for (int64_t i = 0; i < expected.size(); ++i) elements.equal(i, problem.z[i], expected[i]);
}

}  // namespace

void test_rademacher() {
  for (const Engine& engine : kEngines) {
    for_each_dtype([&](auto type, const std::string& dtype) {
      for (const auto& shapes : {ragged(1), permuted(9), many(), {}}) {
        test_list<decltype(type)>(engine, shapes, engine.name + ", " + dtype);
      }
    });
  }
}

}  // namespace adahessian::test
