// The launchers' speed without Python and torch: csrc_bench [--numel N] [--rounds N] [--threads N]. Every op is timed
// in turn with streaming the arrays of a step (five read, three of them written back) without arithmetic.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/launch.h"
#include "threads.h"

namespace {

using namespace adahessian;

struct Settings {
  int64_t numel = 25'000'000;
  int64_t rounds = 15;
  int64_t threads = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
};

// Arrays of one parameter, written once by the threads that will use them. M: what m and v are stored in.
template <typename T, typename M>
struct Arrays {
  Arrays(int64_t numel, int64_t block, test::Threads& threads)
      : param(numel), grad(numel), hessian(numel), z(numel), exp_avg(numel), exp_hessian_diag_sq(numel), diag(numel) {
    segment = {0, numel, block, 1, 1, 0, 0, 0, 0, false, param.data(), grad.data(), hessian.data()};
    context.parallel_for = [&threads](int64_t begin, int64_t end, int64_t grain, const auto& body) {
      threads.run(begin, end, grain, body);
    };
    threads.run(0, numel, 1, [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (auto* array : {&param, &grad, &hessian}) store_to((*array)[size_t(i)], float(i % 251) / 64 - 2);
      }
    });
  }

  void perturb(double scale, bool save) {
    cpu::perturb({dtype, z.data(), {segment}, counts(), probe, scale, save}, context);
  }
  void rademacher() const { cpu::rademacher({dtype, z_data(), {segment}, counts(), probe}, context); }
  void hessian_diag() { cpu::hessian_diag({dtype, diag.data(), {segment}, counts(), probe, 1.0, false}, context); }
  void adahessian_step(bool curvature) {
    Segment row = segment;
    if (!curvature) row.hessian = nullptr;
    cpu::adahessian_step({dtype,
                          sizeof(M) == 2 ? Dtype::kBFloat16 : Dtype::kFloat32,
                          {row},
                          nullptr,
                          exp_avg.data(),
                          exp_hessian_diag_sq.data(),
                          nullptr,
                          counts(),
                          reinterpret_cast<const double*>(&hyper),
                          1,
                          probe,
                          nullptr,
                          nullptr,
                          7,
                          nullptr,
                          nullptr},
                         context);
  }
  void stream(test::Threads& threads) {
    threads.run(0, int64_t(param.size()), 1, [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto at = size_t(i);
        store_to(param[at], load_as(param[at]) + load_as(grad[at]));
        store_to(exp_avg[at], load_as(exp_avg[at]) + load_as(hessian[at]));
        store_to(exp_hessian_diag_sq[at], load_as(exp_hessian_diag_sq[at]) + 1);
      }
    });
  }

  Counts counts() const { return {steps, false}; }
  void* z_data() const { return const_cast<T*>(z.data()); }

  static constexpr Dtype dtype = sizeof(T) == 2 ? Dtype::kBFloat16 : Dtype::kFloat32;
  std::vector<T> param, grad, hessian, z;
  std::vector<M> exp_avg, exp_hessian_diag_sq;
  std::vector<float> diag;
  Segment segment;
  Context context;
  Hyper hyper = {1e-3, 0.9, 0.999, 1e-4, 0.01, 1.0, 0.0};
  Probe probe = {1, 0, true};
  int64_t steps[2] = {1, 1};
};

struct Contestant {
  std::string name;
  int64_t bytes;
  std::function<void()> run;
  std::vector<double> seconds = {};

  double percentile(double p) const { return seconds[size_t(p * double(seconds.size() - 1) + 0.5)]; }
};

// Contestants take turns, so that whatever else the machine does hits them alike.
void measure(std::vector<Contestant>& contestants, int64_t rounds) {
  for (int64_t round = -2; round < rounds; ++round) {  // two to warm up
    for (Contestant& c : contestants) {
      const auto start = std::chrono::steady_clock::now();
      c.run();
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      if (round >= 0) c.seconds.push_back(taken.count());
    }
  }
  for (Contestant& c : contestants) std::sort(c.seconds.begin(), c.seconds.end());
}

// The first contestant is the floor.
void print(const std::vector<Contestant>& contestants) {
  const Contestant& floor = contestants.front();
  const double floor_rate = double(floor.bytes) / floor.percentile(0.5);
  for (const Contestant& c : contestants) {
    const double median = c.percentile(0.5), rate = double(c.bytes) / median;
    std::printf("%-36s %10.3f %10.3f %10.3f %9.2f %15.2f\n", c.name.c_str(), 1e3 * median, 1e3 * c.percentile(0.2),
                1e3 * c.percentile(0.8), rate / 1e9, floor_rate / rate);
  }
}

template <typename T, typename M>
void bench(const Settings& settings, const std::string& dtype, const std::vector<int64_t>& blocks,
           test::Threads& threads) {
  const int64_t n = settings.numel, p = sizeof(T), state = sizeof(M);
  for (const int64_t block : blocks) {
    Arrays<T, M> arrays(n, block, threads);
    const std::string suffix = " " + dtype + " b=" + std::to_string(block);
    std::vector<Contestant> contestants = {
        {"streaming " + dtype, n * (4 * p + 4 * state), [&] { arrays.stream(threads); }},
        {"adahessian_step" + suffix, n * (4 * p + 4 * state), [&] { arrays.adahessian_step(true); }},
        {"hessian_diag" + suffix, n * p + (n + block - 1) / block * 4, [&] { arrays.hessian_diag(); }},
    };
    if (block == 1) {
      contestants.push_back(
          {"adahessian_step off-step " + dtype, n * 3 * (p + state), [&] { arrays.adahessian_step(false); }});
      contestants.push_back({"rademacher " + dtype, n * p, [&] { arrays.rademacher(); }});
      contestants.push_back({"perturb, saving " + dtype, n * 3 * p, [&] { arrays.perturb(1e-3, true); }});
      contestants.push_back({"perturb, put back " + dtype, n * 2 * p, [&] { arrays.perturb(0, false); }});
    }
    measure(contestants, settings.rounds);
    print(contestants);
  }
}

bool parse(int argc, char** argv, Settings& settings) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    int64_t* target = name == "--numel"     ? &settings.numel
                      : name == "--rounds"  ? &settings.rounds
                      : name == "--threads" ? &settings.threads
                                            : nullptr;
    if (target == nullptr || (*target = std::atoll(argv[i + 1])) < 1) return false;
  }
  return argc % 2 == 1;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  if (!parse(argc, argv, settings)) {
    std::fprintf(stderr, "usage: %s [--numel N] [--rounds N] [--threads N], each at least 1\n", argv[0]);
    return 2;
  }
  std::printf("%lld numbers, %lld threads, median of %lld rounds\n", static_cast<long long>(settings.numel),
              static_cast<long long>(settings.threads), static_cast<long long>(settings.rounds));
  std::printf("%-36s %10s %10s %10s %9s %15s\n", "", "ms", "p20", "p80", "GB/s", "per byte/floor");
  test::Threads threads(int(settings.threads));
  bench<float, float>(settings, "float32", {1, 9, 32, 128, settings.numel}, threads);
  bench<bfloat16, float>(settings, "bfloat16", {1, 9}, threads);
  bench<float, bfloat16>(settings, "bf16 states", {1, 9}, threads);
  bench<bfloat16, bfloat16>(settings, "bf16 everything", {1, 9}, threads);
  return 0;
}
