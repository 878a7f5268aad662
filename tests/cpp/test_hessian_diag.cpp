// The block-averaged diagonal (Eq. 6, 7) of lists of parameters, for every block length.
#include "check.h"
#include "expected.h"
#include "shapes.h"
#include "tests.h"

namespace adahessian::test {
namespace {

template <typename T>
void test_list(const Engine& engine, const std::vector<Shape>& shapes, bool draw, bool accumulate,
               const std::string& name) {
  Problem<T> problem(shapes, {.n_slots = 2, .shift = draw, .gap = 2});
  problem.probe.draw = draw;
  const double scale = 0.3, before = accumulate ? kUntouched : 0;
  problem.hessian_diag(engine, scale, accumulate);
  constexpr double u = kUnit<StateOf<T>>;
  Array<double> expected(problem.diag.size()), bound(problem.diag.size());
  for (int64_t i = 0; i < expected.size(); ++i) expected.set(i, kUntouched);
  for (size_t number = 0; number < problem.segments.size(); ++number) {
    int64_t i = problem.segments[number].diag_offset;
    for (const double mean : expected_means(problem, number)) {
      expected.set(i, before + scale * mean);
      bound.set(i++, u * (4 * std::abs(scale * mean) + std::abs(before + scale * mean)));
    }
  }
  Elements elements(name + ", diag");
  for (int64_t i = 0; i < expected.size(); ++i) elements.within(i, problem.diag[i], expected[i], bound[i]);
}

}  // namespace

void test_hessian_diag() {
  for (const Engine& engine : kEngines) {
    for_each_dtype([&](auto type, const std::string& dtype) {
      int number = 0;
      for (const auto& shapes : all_lists()) {
        const std::string name = engine.name + ", " + dtype + ", list " + std::to_string(number);
        test_list<decltype(type)>(engine, shapes, number % 5 != 4, number % 3 == 2, name);
        ++number;
      }
    });
  }
}

}  // namespace adahessian::test
