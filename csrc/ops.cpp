// The operators: schemas, argument checks and the way from tensors to the raw-pointer launchers of launch.h.
// Built on PyTorch's stable ABI, so one library serves every torch >= 2.10, with and without CUDA.
#include "ops.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace adahessian {
namespace {

// Columns of the segment table and of the others; adahessian_fused/segments.py explains them.
enum Column { kOffset, kNumel, kBlock, kPeriod, kStride, kDiagOffset, kParamId, kGroup, kSlot, kAbsolute, kColumns };
constexpr int64_t kHyperColumns = sizeof(Hyper) / sizeof(double);
constexpr int64_t kStepColumns = 2;

// A flat buffer: one-dimensional, contiguous, of the given dtype.
void check_flat(const char* op, const char* argument, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), op, ": ", argument, " has shape ", shape_of(tensor),
                  tensor.is_contiguous() ? "" : " and is not contiguous", "; expected a contiguous 1-D buffer");
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", argument, " is ", name_of(tensor.scalar_type()),
                  "; expected ", name_of(type));
}

void check_table(const char* op, const char* argument, const Tensor& tensor, ScalarType type, int64_t columns) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type && tensor.dim() == 2 && tensor.size(1) == columns && tensor.is_contiguous(), op,
      ": ", argument, " is ", name_of(tensor.scalar_type()), " of shape ", shape_of(tensor), "; expected a contiguous ",
      name_of(type), " table of shape (n, ", columns, ")");
}

std::vector<Segment> read_segments(const char* op, const Tensor& table, const Tensor& steps) {
  check_table(op, "segments", table, ScalarType::Long, kColumns);
  STD_TORCH_CHECK(!table.is_cuda(), op, ": segments is on a GPU; expected a CPU tensor");
  check_table(op, "steps", steps, ScalarType::Long, kStepColumns);
  const auto* row = static_cast<const int64_t*>(table.const_data_ptr());
  std::vector<Segment> segments(table.size(0));
  for (size_t i = 0; i < segments.size(); ++i, row += kColumns) {
    Segment& s = segments[i];
    s = {row[kOffset],
         row[kNumel],
         row[kBlock],
         row[kPeriod],
         row[kStride],
         row[kDiagOffset],
         row[kSlot],
         uint32_t(row[kParamId]),
         int32_t(row[kGroup]),
         row[kAbsolute] != 0,
         nullptr,
         nullptr,
         nullptr};
    STD_TORCH_CHECK(s.offset >= 0 && s.numel >= 0 && s.block >= 1 && s.period >= 1 && s.stride >= 1 &&
                        s.diag_offset >= 0 && row[kGroup] >= 0 && row[kGroup] <= INT32_MAX,
                    op, ": segments row ", i, " has offset ", s.offset, ", numel ", s.numel, ", block ", s.block,
                    ", period ", s.period, ", stride ", s.stride, ", diag_offset ", s.diag_offset, ", group ",
                    row[kGroup], "; expected block, period, stride >= 1 and none of the others negative");
    // Written without products that could overflow.
    STD_TORCH_CHECK(s.numel % s.period == 0 && s.numel / s.period % s.stride == 0, op, ": segments row ", i,
                    " has numel ", s.numel, "; expected a multiple of period ", s.period, " times stride ", s.stride);
    s.block = std::min(s.block, std::max<int64_t>(s.numel, 1));  // a longer block averages what there is
    STD_TORCH_CHECK(s.slot >= 0 && s.slot < steps.size(0), op, ": segments row ", i, " has slot ", s.slot,
                    "; expected a row of steps, which has ", steps.size(0));
  }
  return segments;
}

// Every segment has to lie inside the flat buffer of parameter-sized numbers.
void check_inside(const char* op, const char* argument, const Tensor& flat, const std::vector<Segment>& segments) {
  for (const Segment& s : segments) {
    STD_TORCH_CHECK(s.numel <= flat.numel() && s.offset <= flat.numel() - s.numel, op, ": ", argument, " has ",
                    flat.numel(), " elements; expected at least ", s.offset + s.numel, " for the segment at offset ",
                    s.offset);
  }
}

// The same for the compact diagonal.
void check_inside_diag(const char* op, const Tensor& diag, const std::vector<Segment>& segments) {
  for (const Segment& s : segments) {
    const int64_t blocks = (s.numel + s.block - 1) / s.block;
    STD_TORCH_CHECK(blocks <= diag.numel() && s.diag_offset <= diag.numel() - blocks, op, ": diag has ", diag.numel(),
                    " elements; expected room for ", blocks, " blocks from diag_offset ", s.diag_offset, " on");
  }
}

// Whether the tensor is dense in the storage order that period and stride declare.
bool stored_as(const Tensor& tensor, const Segment& s) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t matrix = s.period * s.stride;
  int64_t inner = 1;  // logical distance of neighbours along the dimension
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    const int64_t expected = inner < s.period ? inner * s.stride : inner < matrix ? inner / s.period : inner;
    const int64_t outer = inner * sizes[d];
    const bool straddles = (inner < s.period && outer > s.period) || (inner < matrix && outer > matrix);
    if (strides[d] != expected || straddles) return false;
    inner = outer;
  }
  return true;
}

// Checks a list against the segments and stores each tensor's address through `set`.
template <typename Set>
void attach(const char* op, const char* argument, const TensorList& tensors, std::vector<Segment>& segments,
            ScalarType type, const Tensor& device_of, const Set& set) {
  STD_TORCH_CHECK(tensors.size() == segments.size(), op, ": ", argument, " has ", tensors.size(), " tensors; expected ",
                  segments.size(), ", one for each segment");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    Segment& s = segments[i];
    STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", argument, "[", i, "] is ", name_of(tensor.scalar_type()),
                    "; expected ", name_of(type));
    STD_TORCH_CHECK(tensor.numel() == s.numel, op, ": ", argument, "[", i, "] has shape ", shape_of(tensor),
                    "; expected ", s.numel, " elements");
    STD_TORCH_CHECK(s.numel == 0 || stored_as(tensor, s), op, ": ", argument, "[", i,
                    "] is not stored the way its segment says; expected it dense with period ", s.period,
                    " and stride ", s.stride);
    check_same_device(op, argument, tensor, device_of);
    set(s, tensor.data_ptr());
  }
}

const float* scalar(const char* op, const char* argument, const OptionalTensor& tensor, const Tensor& device_of) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->numel() == 1, op, ": ", argument, " is ",
                  name_of(tensor->scalar_type()), " of shape ", shape_of(*tensor), "; expected one float32 number");
  check_same_device(op, argument, *tensor, device_of);
  return static_cast<const float*>(tensor->const_data_ptr());
}

// A number for each row of steps, in the memory of the device.
template <typename Number>
Number* per_slot(const char* op, const char* argument, const OptionalTensor& tensor, ScalarType type,
                 const Tensor& steps, const Tensor& device_of) {
  if (!tensor.has_value()) return nullptr;
  check_flat(op, argument, *tensor, type);
  STD_TORCH_CHECK(tensor->numel() == steps.size(0), op, ": ", argument, " has ", tensor->numel(),
                  " elements; expected ", steps.size(0), ", one for each row of steps");
  check_same_device(op, argument, *tensor, device_of);
  return static_cast<Number*>(tensor->data_ptr());
}

// One instance for each set of launchers.
struct Cpu {
  static constexpr auto rademacher = cpu::rademacher;
  static constexpr auto perturb = cpu::perturb;
  static constexpr auto hessian_diag = cpu::hessian_diag;
  static constexpr auto adahessian_step = cpu::adahessian_step;
};
struct Emulated {
  static constexpr auto rademacher = emulated::rademacher;
  static constexpr auto perturb = emulated::perturb;
  static constexpr auto hessian_diag = emulated::hessian_diag;
  static constexpr auto adahessian_step = emulated::adahessian_step;
};
#ifdef ADAHESSIAN_WITH_CUDA
struct Cuda {
  static constexpr auto rademacher = cuda::rademacher;
  static constexpr auto perturb = cuda::perturb;
  static constexpr auto hessian_diag = cuda::hessian_diag;
  static constexpr auto adahessian_step = cuda::adahessian_step;
};
#endif

Counts read_counts(const char* op, const Tensor& steps, const Tensor& device_of) {
  if (steps.is_cuda()) check_same_device(op, "steps", steps, device_of);
  return {static_cast<const int64_t*>(steps.const_data_ptr()), steps.is_cuda()};
}

// ---- the operators
// ----------------------------------------------------------------------------------------------------

template <typename Launchers>
void rademacher(Tensor z, Tensor segments, Tensor steps, int64_t seed, int64_t sample) {
  const char* op = "rademacher";
  RademacherArgs args;
  args.dtype = dtype_of(op, "z", z);
  args.segments = read_segments(op, segments, steps);
  check_flat(op, "z", z, z.scalar_type());
  check_inside(op, "z", z, args.segments);
  args.z = z.data_ptr();
  args.counts = read_counts(op, steps, z);
  args.probe = {uint64_t(seed), uint32_t(sample), true};
  const Scope scope(z);
  Launchers::rademacher(args, scope.context());
}

template <typename Launchers>
void perturb(TensorList params, Tensor saved, Tensor segments, Tensor steps, int64_t seed, int64_t sample, double scale,
             bool save) {
  const char* op = "perturb";
  if (params.empty()) {
    STD_TORCH_CHECK(segments.numel() == 0, op, ": params is empty; expected ", segments.size(0), " tensors");
    return;
  }
  PerturbArgs args;
  args.dtype = dtype_of(op, "params[0]", params[0]);
  args.segments = read_segments(op, segments, steps);
  attach(op, "params", params, args.segments, params[0].scalar_type(), saved,
         [](Segment& s, void* data) { s.param = data; });
  check_flat(op, "saved", saved, params[0].scalar_type());
  check_inside(op, "saved", saved, args.segments);
  args.saved = saved.data_ptr();
  args.counts = read_counts(op, steps, saved);
  args.probe = {uint64_t(seed), uint32_t(sample), true};
  args.scale = scale;
  args.save = save;
  const Scope scope(saved);
  Launchers::perturb(args, scope.context());
}

template <typename Launchers>
void hessian_diag(TensorList hessians, Tensor diag, Tensor segments, Tensor steps, int64_t seed, int64_t sample,
                  bool is_hvp, double scale, bool accumulate) {
  const char* op = "hessian_diag";
  if (hessians.empty()) {
    STD_TORCH_CHECK(segments.numel() == 0, op, ": hessians is empty; expected ", segments.size(0), " tensors");
    return;
  }
  HessianDiagArgs args;
  args.dtype = dtype_of(op, "hessians[0]", hessians[0]);
  args.segments = read_segments(op, segments, steps);
  attach(op, "hessians", hessians, args.segments, hessians[0].scalar_type(), diag,
         [](Segment& s, void* data) { s.hessian = data; });
  check_flat(op, "diag", diag, state_type(args.dtype));
  check_inside_diag(op, diag, args.segments);
  args.diag = diag.data_ptr();
  args.counts = read_counts(op, steps, diag);
  args.probe = {uint64_t(seed), uint32_t(sample), is_hvp};
  args.scale = scale;
  args.accumulate = accumulate;
  const Scope scope(diag);
  Launchers::hessian_diag(args, scope.context());
}

// What adahessian_step does once the segments have their tensors' addresses.
template <typename Launchers>
void update_segments(AdaHessianStepArgs& args, ScalarType type, const OptionalTensor& diag, const Tensor& exp_avg,
                     const Tensor& exp_hessian_diag_sq, const OptionalTensor& master, const Tensor& steps,
                     const Tensor& groups, const Probe& probe, int64_t rounding_seed, const OptionalTensor& grad_scale,
                     const OptionalTensor& found_inf, const OptionalTensor& means, const OptionalTensor& missed) {
  const char* op = "adahessian_step";
  const bool rounds = exp_avg.scalar_type() == ScalarType::BFloat16 && args.dtype != Dtype::kFloat64;
  args.state_dtype = rounds ? Dtype::kBFloat16 : args.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const ScalarType stored = rounds ? ScalarType::BFloat16 : state_type(args.dtype);
  check_flat(op, "exp_avg", exp_avg, stored);
  check_flat(op, "exp_hessian_diag_sq", exp_hessian_diag_sq, stored);
  check_same_device(op, "exp_hessian_diag_sq", exp_hessian_diag_sq, exp_avg);
  check_inside(op, "exp_avg", exp_avg, args.segments);
  check_inside(op, "exp_hessian_diag_sq", exp_hessian_diag_sq, args.segments);
  args.exp_avg = exp_avg.data_ptr();
  args.exp_hessian_diag_sq = exp_hessian_diag_sq.data_ptr();
  args.diag = nullptr;
  if (diag.has_value()) {
    check_flat(op, "diag", *diag, state_type(args.dtype));
    check_same_device(op, "diag", *diag, exp_avg);
    check_inside_diag(op, *diag, args.segments);
    args.diag = diag->const_data_ptr();
  }
  args.master = nullptr;
  if (master.has_value()) {
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, op, ": master is given for ",
                    name_of(type), " parameters; expected None, master weights are for 16-bit parameters");
    check_flat(op, "master", *master, ScalarType::Float);
    check_same_device(op, "master", *master, exp_avg);
    check_inside(op, "master", *master, args.segments);
    args.master = static_cast<float*>(master->data_ptr());
  }
  check_table(op, "groups", groups, ScalarType::Double, kHyperColumns);
  check_same_device(op, "groups", groups, steps);
  args.groups = static_cast<const double*>(groups.const_data_ptr());
  args.n_groups = groups.size(0);
  for (const Segment& s : args.segments) {
    STD_TORCH_CHECK(s.group < args.n_groups, op, ": segments name group ", s.group, "; expected a row of groups, ",
                    "which has ", args.n_groups);
  }
  args.counts = read_counts(op, steps, exp_avg);
  args.probe = probe;
  args.grad_scale = scalar(op, "grad_scale", grad_scale, exp_avg);
  args.found_inf = scalar(op, "found_inf", found_inf, exp_avg);
  args.rounding_seed = uint64_t(rounding_seed);
  args.means = per_slot<const double>(op, "means", means, ScalarType::Double, steps, exp_avg);
  args.missed = per_slot<int64_t>(op, "missed", missed, ScalarType::Long, steps, exp_avg);
  const Scope scope(exp_avg);
  Launchers::adahessian_step(args, scope.context());
}

template <typename Launchers>
void adahessian_step(TensorList params, TensorList grads, TensorList hessians, OptionalTensor diag, Tensor exp_avg,
                     Tensor exp_hessian_diag_sq, OptionalTensor master, Tensor segments, Tensor steps, Tensor groups,
                     int64_t seed, int64_t sample, bool is_hvp, int64_t rounding_seed, OptionalTensor grad_scale,
                     OptionalTensor found_inf, OptionalTensor means, OptionalTensor missed) {
  const char* op = "adahessian_step";
  if (params.empty()) {
    STD_TORCH_CHECK(segments.numel() == 0, op, ": params is empty; expected ", segments.size(0), " tensors");
    return;
  }
  AdaHessianStepArgs args;
  args.dtype = dtype_of(op, "params[0]", params[0]);
  const ScalarType type = params[0].scalar_type();
  args.segments = read_segments(op, segments, steps);
  attach(op, "params", params, args.segments, type, exp_avg, [](Segment& s, void* data) { s.param = data; });
  attach(op, "grads", grads, args.segments, type, exp_avg, [](Segment& s, void* data) { s.grad = data; });
  if (!hessians.empty()) {
    STD_TORCH_CHECK(!diag.has_value(), op, ": hessians and diag are both given; expected one source of curvature");
    attach(op, "hessians", hessians, args.segments, type, exp_avg, [](Segment& s, void* data) { s.hessian = data; });
  }
  update_segments<Launchers>(args, type, diag, exp_avg, exp_hessian_diag_sq, master, steps, groups,
                             {uint64_t(seed), uint32_t(sample), is_hvp}, rounding_seed, grad_scale, found_inf, means,
                             missed);
}

// The same for tensors that the caller has looked at (csrc/looks.h) and keeps alive: a row of addresses for each
// segment, of parameter, gradient and Hessian-vector product, and one of the parameters for its dtype.
template <typename Launchers>
void step_at_addresses(Tensor addresses, Tensor first, OptionalTensor diag, Tensor exp_avg, Tensor exp_hessian_diag_sq,
                       OptionalTensor master, Tensor segments, Tensor steps, Tensor groups, int64_t seed,
                       int64_t sample, bool is_hvp, int64_t rounding_seed, OptionalTensor grad_scale,
                       OptionalTensor found_inf, OptionalTensor means, OptionalTensor missed) {
  const char* op = "adahessian_step";
  AdaHessianStepArgs args;
  args.dtype = dtype_of(op, "first", first);
  args.segments = read_segments(op, segments, steps);
  check_table(op, "addresses", addresses, ScalarType::Long, 3);
  STD_TORCH_CHECK(!addresses.is_cuda() && addresses.size(0) == segments.size(0), op, ": addresses has ",
                  addresses.size(0), " rows; expected ", segments.size(0), " in a CPU tensor, one for each segment");
  const auto* row = static_cast<void* const*>(addresses.const_data_ptr());
  for (Segment& s : args.segments) {
    s.param = row[0];
    s.grad = row[1];
    s.hessian = row[2];
    row += 3;
  }
  update_segments<Launchers>(args, first.scalar_type(), diag, exp_avg, exp_hessian_diag_sq, master, steps, groups,
                             {uint64_t(seed), uint32_t(sample), is_hvp}, rounding_seed, grad_scale, found_inf, means,
                             missed);
}

constexpr const char* kRademacher =
    "rademacher(Tensor(a!) z, Tensor segments, Tensor steps, int seed, int sample) -> ()";
constexpr const char* kPerturb =
    "perturb(Tensor(a!)[] params, Tensor(b!) saved, Tensor segments, Tensor steps, *, int seed, int sample, "
    "float scale, bool save) -> ()";
constexpr const char* kHessianDiag =
    "hessian_diag(Tensor[] hessians, Tensor(a!) diag, Tensor segments, Tensor steps, *, int seed, int sample, "
    "bool is_hvp, float scale, bool accumulate) -> ()";
constexpr const char* kStepAtAddresses =
    "adahessian_step.addresses(Tensor addresses, Tensor first, Tensor? diag, Tensor(b!) exp_avg, "
    "Tensor(c!) exp_hessian_diag_sq, Tensor(d!)? master, Tensor segments, Tensor steps, Tensor groups, *, int seed, "
    "int sample, bool is_hvp, int rounding_seed, Tensor? grad_scale, Tensor? found_inf, Tensor? means, "
    "Tensor(e!)? missed) -> ()";
constexpr const char* kAdaHessianStep =
    "adahessian_step(Tensor(a!)[] params, Tensor[] grads, Tensor[] hessians, Tensor? diag, Tensor(b!) exp_avg, "
    "Tensor(c!) exp_hessian_diag_sq, Tensor(d!)? master, Tensor segments, Tensor steps, Tensor groups, *, int seed, "
    "int sample, bool is_hvp, int rounding_seed, Tensor? grad_scale, Tensor? found_inf, Tensor? means, "
    "Tensor(e!)? missed) -> ()";

template <typename Library>
void define(Library& library) {
  library.def(kRademacher);
  library.def(kPerturb);
  library.def(kHessianDiag);
  library.def(kAdaHessianStep);
  library.def(kStepAtAddresses);
}

template <typename Launchers, typename Library>
void implement(Library& library) {
  library.impl("rademacher", TORCH_BOX(&rademacher<Launchers>));
  library.impl("perturb", TORCH_BOX(&perturb<Launchers>));
  library.impl("hessian_diag", TORCH_BOX(&hessian_diag<Launchers>));
  library.impl("adahessian_step", TORCH_BOX(&adahessian_step<Launchers>));
  library.impl("adahessian_step.addresses", TORCH_BOX(&step_at_addresses<Launchers>));
}

}  // namespace
}  // namespace adahessian

STABLE_TORCH_LIBRARY(adahessian_fused, library) { adahessian::define(library); }
STABLE_TORCH_LIBRARY_IMPL(adahessian_fused, CPU, library) { adahessian::implement<adahessian::Cpu>(library); }
#ifdef ADAHESSIAN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adahessian_fused, CUDA, library) { adahessian::implement<adahessian::Cuda>(library); }
#endif

// For tests: the bodies of the CUDA kernels, thread by thread on the CPU.
STABLE_TORCH_LIBRARY(adahessian_fused_emulated, library) { adahessian::define(library); }
STABLE_TORCH_LIBRARY_IMPL(adahessian_fused_emulated, CPU, library) {
  adahessian::implement<adahessian::Emulated>(library);
}
