// The tensors of one step, made at random from a seed, and the launchers under test.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/launch.h"

namespace adahessian::test {

// A set of launchers that run on the host.
struct Engine {
  std::string name;
  decltype(&cpu::rademacher) rademacher;
  decltype(&cpu::perturb) perturb;
  decltype(&cpu::hessian_diag) hessian_diag;
  decltype(&cpu::adahessian_step) adahessian_step;
};

template <typename T>
constexpr Dtype kDtype = std::is_same_v<T, float>      ? Dtype::kFloat32
                         : std::is_same_v<T, bfloat16> ? Dtype::kBFloat16
                         : std::is_same_v<T, float16>  ? Dtype::kFloat16
                                                       : Dtype::kFloat64;

// Calls f with a value of each parameter type and of each type that its states can be stored in.
template <typename F>
void for_each_storage(const F& f) {
  f(float{}, float{}, "float32"), f(bfloat16{}, float{}, "bfloat16"), f(float16{}, float{}, "float16");
  f(double{}, double{}, "float64"), f(float{}, bfloat16{}, "float32 rounded");
  f(bfloat16{}, bfloat16{}, "bfloat16 rounded"), f(float16{}, bfloat16{}, "float16 rounded");
}

// An array that ends where its memory does, so that AddressSanitizer sees every access behind it. `shift` elements in
// front of it misalign it.
template <typename E>
class Array {
 public:
  explicit Array(int64_t size = 0, int64_t shift = 0)
      : memory_(new E[size_t(size + shift)]()), size_(size), shift_(shift) {}

  E* data() { return memory_.get() + shift_; }
  const E* data() const { return memory_.get() + shift_; }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return double(load_as(data()[i])); }
  void set(int64_t i, double value) { store_to(data()[i], StateOf<E>(value)); }
  bool operator==(const Array& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data(), other.data(), size_t(size_) * sizeof(E)) == 0);
  }

 private:
  std::unique_ptr<E[]> memory_;
  int64_t size_, shift_;
};

struct Shape {
  int64_t numel, block = 1, period = 1, stride = 1;
  bool absolute = false;
};

// How the tensors of a problem lie, and what else varies.
struct Options {
  int n_groups = 1, n_slots = 1;
  int64_t shift = 0;  // misaligns parameters, gradients and Hessian-vector products
  int64_t gap = 0;    // elements between the segments of the flat buffers
  bool master = false, with_scale = false;
};

// Numbers are multiples of 1/8 below 16: exact in every dtype, and sums of them are exact in every order.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return int64_t(engine_() % uint64_t(n)); }
  double eighths() { return double(below(255) - 127) / 8; }

 private:
  std::mt19937 engine_;  // whose numbers, unlike those of the distributions, are the same everywhere
};

// M: what m and v are stored in.
template <typename T, typename M = StateOf<T>>
struct Problem {
  using S = StateOf<T>;

  Problem(const std::vector<Shape>& shapes, const Options& options = {}, uint32_t seed = 1) {
    Random random(seed);
    int64_t offset = options.gap, diag_offset = options.gap;
    for (const Shape& s : shapes) {
      const int64_t i = int64_t(segments.size());
      segments.push_back({offset, s.numel, std::min(s.block, std::max<int64_t>(s.numel, 1)), s.period, s.stride,
                          diag_offset, i % options.n_slots, uint32_t(7 * i + 3), int32_t(i % options.n_groups),
                          s.absolute, nullptr, nullptr, nullptr});
      offset += s.numel + options.gap;
      diag_offset += blocks_of(segments.back()) + options.gap;
      param.push_back(filled<T>(s.numel, options.shift, random));
      grad.push_back(filled<T>(s.numel, options.shift, random));
      hessian.push_back(filled<T>(s.numel, options.shift, random));
    }
    z = Array<T>(offset), saved = Array<T>(offset);
    exp_avg = Array<M>(offset), exp_hessian_diag_sq = Array<M>(offset);
    master = Array<float>(options.master ? offset : 0);
    diag = Array<S>(diag_offset);
    for (size_t i = 0; i < segments.size(); ++i) fill_states(i, options.master, random);
    for (int i = 0; i < options.n_slots; ++i) steps.insert(steps.end(), {3 * i, i});  // slot 0: the first step
    const double powers[] = {1.0, 0.5, 0.75};
    for (int i = 0; i < options.n_groups; ++i) {
      groups.push_back({0.15 / (i + 1), 0.9, 0.99, 1e-2, 0.01 * i, powers[i % 3], double(i % 2)});
      groups.back().holds = i % 2;
      groups.back().clip = i % 3 == 1 ? 0.5 : INFINITY;
      groups.back().shrink = i % 4;
    }
    missed.resize(size_t(options.n_slots));
    for (int i = 0; i < options.n_slots; ++i) means.push_back(0.5 + i);
    with_scale = options.with_scale;
    context.parallel_for = [](int64_t begin, int64_t end, int64_t, const auto& body) {
      if (begin < end) body(begin, end);
    };
    context.allocate = [this](size_t bytes) {
      workspaces.emplace_back(new char[bytes]);
      return static_cast<void*>(workspaces.back().get());
    };
    context.upload = [this](const void* bytes, size_t size) {
      return std::memcpy(context.allocate(size), bytes, size);
    };
  }
  Problem(const Problem&) = delete;

  static int64_t blocks_of(const Segment& s) { return (s.numel + s.block - 1) / s.block; }

  void rademacher(const Engine& engine) { engine.rademacher(rademacher_args(), context); }

  // With scale 0 the saved values are put back; a move from the saved values does not save.
  void perturb(const Engine& engine, double scale, bool save) {
    engine.perturb({kDtype<T>, saved.data(), table(false), {steps.data(), false}, probe, scale, save}, context);
  }

  void hessian_diag(const Engine& engine, double scale = 1, bool accumulate = false) {
    engine.hessian_diag(hessian_diag_args(scale, accumulate), context);
  }

  enum class Source { kHessian, kDiag, kNone };

  void adahessian_step(const Engine& engine, Source source = Source::kHessian) {
    engine.adahessian_step(step_args(source), context);
  }

  RademacherArgs rademacher_args() { return {kDtype<T>, z.data(), segments, {steps.data(), false}, probe}; }

  HessianDiagArgs hessian_diag_args(double scale = 1, bool accumulate = false) {
    return {kDtype<T>, diag.data(), table(true), {steps.data(), false}, probe, scale, accumulate};
  }

  AdaHessianStepArgs step_args(Source source, bool counts_on_device = false) {
    return {kDtype<T>,
            kDtype<M>,
            table(source == Source::kHessian),
            source == Source::kDiag ? diag.data() : nullptr,
            exp_avg.data(),
            exp_hessian_diag_sq.data(),
            master.size() ? master.data() : nullptr,
            {steps.data(), counts_on_device},
            reinterpret_cast<const double*>(groups.data()),
            int64_t(groups.size()),
            probe,
            with_scale ? &grad_scale : nullptr,
            with_scale ? &found_inf : nullptr,
            rounding_seed,
            means.data(),
            missed.data()};
  }

  // The ops one after the other.
  void run_all(const Engine& engine, Source source = Source::kHessian) {
    rademacher(engine);
    hessian_diag(engine);
    adahessian_step(engine, source);
    perturb(engine, 0.25, true);
  }

  bool same_results(const Problem& other) const {
    return z == other.z && saved == other.saved && diag == other.diag && exp_avg == other.exp_avg &&
           master == other.master && exp_hessian_diag_sq == other.exp_hessian_diag_sq && param == other.param &&
           missed == other.missed;
  }

  std::vector<Segment> segments;
  std::vector<Array<T>> param, grad, hessian;
  Array<T> z, saved;
  Array<M> exp_avg, exp_hessian_diag_sq;
  Array<S> diag;
  Array<float> master;
  std::vector<int64_t> steps, missed;
  std::vector<Hyper> groups;
  std::vector<double> means;
  uint64_t rounding_seed = 0xFEDCBA9876543210u;
  Probe probe = {0x123456789ABCDEF0u, 2, true};
  float grad_scale = 4, found_inf = 0;
  bool with_scale;
  Context context;

 private:
  template <typename E>
  static Array<E> filled(int64_t size, int64_t shift, Random& random) {
    Array<E> array(size, shift);
    for (int64_t i = 0; i < size; ++i) array.set(i, random.eighths());
    return array;
  }

  void fill_states(size_t number, bool with_master, Random& random) {
    const Segment& s = segments[number];
    for (int64_t i = 0; i < s.numel; ++i) {
      exp_avg.set(s.offset + i, random.eighths());
      exp_hessian_diag_sq.set(s.offset + i, std::abs(random.eighths()));
      if (with_master) master.set(s.offset + i, param[number][i] * (1 + 1e-4));
    }
  }

  std::vector<Segment> table(bool with_hessian) {
    std::vector<Segment> rows = segments;
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i].param = param[i].data(), rows[i].grad = grad[i].data();
      rows[i].hessian = with_hessian ? hessian[i].data() : nullptr;
    }
    return rows;
  }

  std::vector<std::unique_ptr<char[]>> workspaces;
};

}  // namespace adahessian::test
