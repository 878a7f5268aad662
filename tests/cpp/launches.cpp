// What Python cannot reach of the CUDA planning: how many launches there are, the table during stream capture, step
// counts on the device, and parameters of more than 2^31 elements. Runs on the host; prints what failed.
#include <array>
#include <string>
#include <vector>

#include "../../csrc/cuda/emulate.h"
#include "../../csrc/cuda/rademacher.h"
#include "../../csrc/cuda/step_plan.h"
#include "../../csrc/upload_cache.h"
#include "check.h"
#include "problem.h"

namespace {

using namespace adahessian;
using gpu::EmulatedDevice;
using test::check;
using test::check_equal;
using test::Shape;

// The tensors of one step, what is uploaded for it, and how many launches each op takes.
struct Launches : test::Problem<float> {
  explicit Launches(const std::vector<Shape>& shapes, int n_groups = 1, int n_slots = 1)
      : Problem(shapes, {.n_groups = n_groups, .n_slots = n_slots}) {
    context.upload = [this](const void* bytes, size_t size) {
      const auto* begin = static_cast<const char*>(bytes);
      return uploads.find(bytes, size, [&] { return ++n_uploads, std::vector<char>(begin, begin + size); }).data();
    };
  }

  int step(bool counts_on_device = false) {
    EmulatedDevice device(context);
    gpu::adahessian_step<float>(step_args(Source::kHessian, counts_on_device), device);
    return device.launches;
  }

  int hessian_diag() {
    EmulatedDevice device(context);
    gpu::hessian_diag<float>(hessian_diag_args(), device);
    return device.launches;
  }

  int rademacher() {
    EmulatedDevice device(context);
    gpu::rademacher<float>(rademacher_args(), device);
    return device.launches;
  }

  UploadCache<std::vector<char>> uploads;
  int n_uploads = 0;
};

std::vector<Shape> mixed_shapes(int n) {
  const Shape shapes[] = {{7, 1}, {576, 9, 9, 64}, {0, 1}, {300, 32}, {2048, 2048}, {130, 130}, {64, 4, 8, 8}};
  std::vector<Shape> result;
  for (int i = 0; i < n; ++i) result.push_back(shapes[i % std::size(shapes)]);
  return result;
}

// Blocks that fit into a tile: one launch an op, whatever the number of tensors. Longer ones: a launch a level more.
void test_number_of_launches() {
  for (const int n : {7, 1000}) {
    Launches problem(mixed_shapes(n), 3);
    const std::string name = std::to_string(n) + " tensors, ";
    check_equal(problem.rademacher(), 1, name + "rademacher");
    check_equal(problem.hessian_diag(), 1, name + "hessian_diag");
    check_equal(problem.step(), 1, name + "step");
  }
  Launches lengthy({{5, 1}, {9000, 5000}, {10001, 10001}});
  check_equal(lengthy.hessian_diag(), 2, "block 5000, hessian_diag");
  check_equal(lengthy.step(), 3, "block 5000, step");
  Launches huge({{3000001, 3000001}});
  check_equal(huge.hessian_diag(), 3, "block 3000001, hessian_diag");
  // A transposed parameter whose places have to be computed does not slow the others down.
  Launches gathered({{576, 9}, {300 * 40, 40, 40, 300}, {7, 1}});
  check_equal(gathered.step(), 1, "strips and blocks, step");
  Launches computed_places({{576, 9}, {2 * 5000 * 4, 7, 4, 5000}, {7, 1}});
  check_equal(computed_places.step(), 2, "computed places and blocks, step");
  check_equal(Launches({{576, 9}, {7, 1}}).step(true), 2, "counts on the device, step");
  Launches empty({{0, 1}, {0, 5}});
  check_equal(empty.rademacher() + empty.hessian_diag() + empty.step(), 0, "nothing to do");
}

// A table that is uploaded, and one that is spread over launches because nothing may be, give the same numbers.
void test_long_tables() {
  for (const int n_groups : {1, 60}) {
    Launches uploaded(mixed_shapes(1000), n_groups, 7), captured(mixed_shapes(1000), n_groups, 7);
    captured.context.upload = nullptr;
    uploaded.rademacher(), uploaded.hessian_diag(), uploaded.step();
    check(captured.rademacher() > 1 && captured.hessian_diag() > 1 && captured.step() > 3, "capture takes launches");
    check(uploaded.same_results(captured), "capture gives the same results");
  }
}

// What a step sends is not sent again by the next one, whose step counts and learning rate are others; what a new
// address changes is.
void test_unchanged_tables_stay() {
  Launches problem(mixed_shapes(1000), 3, 7);
  problem.rademacher(), problem.hessian_diag(), problem.step();
  check_equal(problem.n_uploads, 3, "a table for each op");
  for (int64_t& count : problem.steps) ++count;
  for (Hyper& hyper : problem.groups) hyper.lr /= 2;
  problem.rademacher(), problem.hessian_diag(), problem.step();
  check_equal(problem.n_uploads, 3, "the same tables in the next step");
  problem.grad[999] = test::Array<float>(problem.grad[999].size());
  problem.rademacher(), problem.hessian_diag(), problem.step();
  check_equal(problem.n_uploads, 4, "a gradient that has moved");
}

void test_upload_cache() {
  UploadCache<int> cache;
  int sent = 0;
  const auto find = [&](int value) { return cache.find(&value, sizeof(value), [&] { return ++sent; }); };
  const int kEntries = int(cache.kEntries);
  check_equal(find(100), 1, "sent");
  for (int i = 1; i < kEntries; ++i) find(i);
  check_equal(find(100), 1, "kept while there is room");
  find(-1);
  check_equal(find(100), 1, "what was asked for lately stays");
  check_equal(sent, kEntries + 1, "nothing is sent twice");
  check_equal(find(1), kEntries + 2, "what was not asked for longest went");
}

void test_counts_on_the_device() {
  for (const int n : {20, 1000}) {
    Launches on_host(mixed_shapes(n), 3, 5), on_device(mixed_shapes(n), 3, 5);
    on_host.step(), on_device.step(true);
    check(on_host.same_results(on_device), "counts on the device give the same results");
  }
}

// The tiles of a parameter follow each other without a gap, and every place is inside it.
template <gpu::Order kOrder>
void check_tiles(const gpu::Geometry& g, const std::string& name) {
  const int64_t n = g.n_tiles();
  int64_t next = 0;
  for (int64_t i = 0; i < n; ++i) {
    const gpu::Tile tile = gpu::cut<4, kOrder>(g, uint32_t(i));
    if (tile.begin != next || tile.count <= 0 || tile.count > gpu::Traits<float>::kTile) {
      return check(false, name + ": tile " + std::to_string(i) + " begins at " + std::to_string(tile.begin));
    }
    next += tile.count;
    if (i > 3 && i < n - 3 && i % 100003 != 0) continue;
    int64_t elements = 0;
    for (int slot_number = 0; slot_number < 2 * gpu::kThreads; ++slot_number) {
      const gpu::Slot slot = gpu::slot_of<4, kOrder>(tile, slot_number);
      for (int e = 0; e < 4; ++e) {
        if (!gpu::has(slot, e)) continue;
        const int64_t logical = tile.begin + gpu::logical_index<kOrder>(tile, slot, e);
        const int64_t matrix = g.period * g.stride, inside = logical % matrix;
        const int64_t place = logical - inside + inside % g.period * g.stride + inside / g.period;
        if (gpu::storage_index<kOrder>(tile, slot, e) != place) return check(false, name + ": wrong place");
        ++elements;
      }
    }
    if (elements != tile.count) return check(false, name + ": elements without a slot");
  }
  check_equal(next, g.numel, name + ": elements in tiles");
}

void test_many_elements() {
  const gpu::Tiler tiler = gpu::Tiler::of<float>();
  const int64_t big = (int64_t{1} << 32) + 12345;
  check_tiles<gpu::Order::kFlat>(tiler.flat(big), "elementwise");
  for (const int64_t block : {2, 9, 127, 1025, 2044}) {
    check_tiles<gpu::Order::kLogical>(tiler.ordered(big, block, 1, 1), "block " + std::to_string(block));
  }
  check_tiles<gpu::Order::kFlat>(tiler.inside_blocks(big, big / 2 - 1, 1, 1), "two long blocks");
  const int64_t half = 65537;
  const std::array<int64_t, 3> block_period_stride[] = {{9, 9, 64},    {9, 9, 1000},     {9, 9, 227},
                                                        {3, 3, 5},     {32, half, 8192}, {half, half, 4099},
                                                        {4, 16, half}, {1, half, half},  {1, 2, 3}};
  for (const auto& [block, period, stride] : block_period_stride) {
    const int64_t numel = ((int64_t{1} << 32) / (period * stride) + 1) * period * stride;
    const auto name =
        "block " + std::to_string(block) + " of " + std::to_string(stride) + " x " + std::to_string(period);
    gpu::Geometry g = tiler.ordered(numel, block, period, stride);
    if (g.length == 0) g = tiler.inside_blocks(numel, block, period, stride);
    check_tiles<gpu::Order::kAny>(g, name);
  }
}

}  // namespace

int main() {
  test_number_of_launches();
  test_long_tables();
  test_unchanged_tables_stay();
  test_upload_cache();
  test_counts_on_the_device();
  test_many_elements();
  return test::report();
}
