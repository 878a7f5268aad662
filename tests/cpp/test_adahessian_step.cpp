// The whole step for every block length, source of curvature and option.
#include "check.h"
#include "expected.h"
#include "shapes.h"
#include "tests.h"

namespace adahessian::test {
namespace {

template <typename T, typename M>
using Source = typename Problem<T, M>::Source;

// The parameter's own rounding: of a master weight, or where it moves.
template <typename T, typename M>
double rounding(const Problem<T, M>& before, int64_t h, const Value& weight) {
  const bool is_rounded = h > 0 || before.master.size() > 0;
  return is_rounded ? storage_rounding<T>(std::abs(weight.value) + weight.bound) : 0;
}

template <typename T, typename M>
void compare_segment(const Problem<T, M>& before, const Problem<T, M>& after, size_t number, Source<T, M> source,
                     const std::string& name) {
  const Segment& s = before.segments[number];
  std::vector<double> means;
  if (source == Source<T, M>::kHessian) means = expected_means(before, number);
  if (source == Source<T, M>::kDiag) {
    for (int64_t i = 0; i < Problem<T, M>::blocks_of(s); ++i) means.push_back(before.diag[s.diag_offset + i]);
  }
  const bool fresh = source != Source<T, M>::kNone, has_master = before.master.size() > 0;
  const int64_t t = before.steps[size_t(2 * s.slot)] + 1, h = before.steps[size_t(2 * s.slot + 1)] + fresh;
  const std::string which = name + ", parameter " + std::to_string(number) + ": ";
  Elements m(which + "exp_avg"), v(which + "exp_hessian_diag_sq"), p(which + "param"), master(which + "master");
  for (int64_t l = 0; l < s.numel; ++l) {
    const int64_t i = storage(s, l), place = s.offset + i;
    const double weight = has_master ? before.master[place] : before.param[number][i];
    const Element expected = expected_element<StateOf<T>>(
        before.groups[size_t(s.group)], t, h, before.with_scale ? 1.0 / before.grad_scale : 1.0,
        before.means[size_t(s.slot)], weight, before.grad[number][i], before.exp_avg[place],
        before.exp_hessian_diag_sq[place], fresh ? &means[size_t(l / s.block)] : nullptr);
    const uint32_t bits = rounding_bits(s, before.rounding_seed, t, i);
    const Value kept_m = rounded<M>(expected.m, bits);
    const Value kept_v = fresh ? rounded<M>(expected.v, (bits & 0xFFu) << 8 | bits >> 8) : expected.v;
    m.within(i, after.exp_avg[place], kept_m.value, kept_m.bound);
    v.within(i, after.exp_hessian_diag_sq[place], kept_v.value, kept_v.bound);
    p.within(i, after.param[number][i], expected.weight.value,
             expected.weight.bound + rounding(before, h, expected.weight));
    if (has_master) master.within(i, after.master[place], expected.weight.value, expected.weight.bound);
  }
}

// What lies between the segments stays as it is.
template <typename T, typename M>
void check_gaps(const Problem<T, M>& after, int64_t gap, const std::string& name) {
  Elements gaps(name + ", between the segments");
  for (const Segment& s : after.segments) {
    for (int64_t i = s.offset + s.numel; i < s.offset + s.numel + gap; ++i) {
      gaps.equal(i, after.exp_avg[i], kUntouched);
      gaps.equal(i, after.exp_hessian_diag_sq[i], kUntouched);
      if (after.master.size() > 0) gaps.equal(i, after.master[i], float(kUntouched));
    }
  }
}

template <typename T, typename M>
void test_list(const Engine& engine, const std::vector<Shape>& shapes, int number, const std::string& name) {
  Options options = {.n_groups = 1 + number % 4, .n_slots = 1 + number % 3, .shift = number % 3, .gap = number % 2 * 5};
  options.master = sizeof(T) == 2 && number % 2 == 1;
  options.with_scale = number % 4 == 3;
  for (const auto source : {Source<T, M>::kHessian, Source<T, M>::kDiag, Source<T, M>::kNone}) {
    Problem<T, M> before(shapes, options), after(shapes, options);
    before.probe.draw = after.probe.draw = number % 5 != 4;
    before.hessian_diag(engine), after.hessian_diag(engine);
    after.adahessian_step(engine, source);
    const std::string which = name + ", source " + std::to_string(int(source));
    for (size_t i = 0; i < before.segments.size(); ++i) compare_segment(before, after, i, source, which);
    check_gaps(after, options.gap, which);
  }
}

// Where Ds is not finite v stays, and is counted, whatever the block length and the layout.
template <typename T, typename M>
void test_missed(const Engine& engine, const std::vector<Shape>& shapes, const std::string& name) {
  using Where = Source<T, M>;
  const Options options = {.n_slots = 2, .shift = 1, .gap = 3, .master = sizeof(T) == 2};
  for (const auto source : {Where::kHessian, Where::kDiag}) {
    Problem<T, M> before(shapes, options), after(shapes, options);
    std::vector<int64_t> missed(2);
    for (auto* problem : {&before, &after}) {
      problem->hessian_diag(engine);
      for (size_t i = 0; i < shapes.size(); ++i) {
        const Segment& s = problem->segments[i];
        if (s.numel == 0) continue;
        const double value = i % 2 ? NAN : -INFINITY;
        const int64_t l = s.numel * 2 / 3, block = l / s.block;  // in logical order
        problem->hessian[i].set(storage(s, l), value);
        problem->diag.set(s.diag_offset + block, value);
        if (problem == &after) missed[size_t(s.slot)] += std::min(s.block, s.numel - block * s.block);
      }
    }
    after.adahessian_step(engine, source);
    for (size_t i = 0; i < shapes.size(); ++i) compare_segment(before, after, i, source, name + ", not finite");
    check(after.missed == missed, name + ": every element is counted once");
  }
}

// found_inf: nothing at all changes.
template <typename T, typename M>
void test_skipped_step(const Engine& engine, const std::string& name) {
  const Options options = {.master = sizeof(T) == 2, .with_scale = true};
  Problem<T, M> before(permuted(9), options), after(permuted(9), options);
  after.found_inf = 1;
  after.adahessian_step(engine);
  check(after.same_results(before), name + ": a step with found_inf changes nothing");
}

}  // namespace

void test_adahessian_step() {
  for (const Engine& engine : kEngines) {
    for_each_storage([&](auto type, auto state_type, const std::string& dtype) {
      using T = decltype(type);
      using M = decltype(state_type);
      int number = 0;
      for (const auto& shapes : all_lists()) {
        // Thread by thread takes its time: every dtype another quarter of the lists.
        if (engine.name == "cpu" || number / 2 % 4 == int(kDtype<T>)) {
          const std::string name = engine.name + ", " + dtype + ", list " + std::to_string(number);
          test_list<T, M>(engine, shapes, number, name);
          test_missed<T, M>(engine, shapes, name);
        }
        ++number;
      }
      if (engine.name == "cpu") test_list<T, M>(engine, {many_long_blocks()}, 0, dtype + ", many long blocks");
      test_skipped_step<T, M>(engine, engine.name + ", " + dtype);
    });
  }
}

}  // namespace adahessian::test
