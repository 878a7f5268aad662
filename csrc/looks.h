// What the tensors of Python lists are like, read from C: their objects answer through DLPack's exchange functions,
// which every version of torch has in the same form. Asking from Python takes ten times as long.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace adahessian {

// Declared as in DLPack 1.3.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void* unused[3];
  int (*look)(void* tensor, DlTensor* out);  // borrows; -1 with a Python error for what has no memory of its own
  void* stream;
};

// The looks of a list of tensors, as they were when it was made.
class Looks {
 public:
  // Of torch.Tensor and torch.nn.Parameter themselves; subclasses may be anything. ValueError for other tensors.
  explicit Looks(pybind11::list tensors);

  // Whether tensors look like these, addresses and all. Never true of empty ones, whose address tells nothing.
  bool same(pybind11::list tensors) const;

  // Writes the addresses of tensors that look like these, but for the address, into a column of a table; returns
  // whether all could be: of the same dtype, device, shape and storage order, and not the negative of what is in
  // memory.
  bool addresses(pybind11::list tensors, int64_t table, int64_t columns, int64_t column) const;

  // The gradients of tensors that are the same objects as others and look like these; None if one is not, or has no
  // gradient, or one that is of a subclass or not strided.
  pybind11::object gradients(pybind11::list tensors, pybind11::list known) const;

 private:
  std::vector<DlTensor> looks_;  // shape and strides point into extents_
  std::vector<int64_t> extents_;
};

// Whether autograd follows any of some tensors.
bool requires_grad(pybind11::list tensors);

// Whether a dict of dicts has these dicts as values, and they these objects, in this order.
bool holds(pybind11::dict states, pybind11::list dicts, pybind11::list objects);

// Adds one to the first of a row's numbers, for all rows of a table in memory of the CPU.
void count(int64_t table, int64_t rows, int64_t columns, int64_t counted);

// Whether any of some numbers in memory of the CPU is not zero.
bool any(int64_t numbers, int64_t size);

// Notes what the gradients of tensors are now: a list of weak references to them, of None where there is none, and one
// of their version counters.
pybind11::tuple note_gradients(pybind11::list tensors);

}  // namespace adahessian
