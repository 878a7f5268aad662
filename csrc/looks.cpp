#include "looks.h"

#include <algorithm>
#include <cstring>

namespace py = pybind11;

namespace adahessian {
namespace {

py::object checked(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

// A property of torch.Tensor, or a method without arguments. Where it is written in C, tensors that are of no subclass
// are asked there and then, which takes half the time.
class Asked {
 public:
  Asked(const py::object& type, const char* name) : name_(PyUnicode_InternFromString(name)) {
    PyObject* found = py::object(type.attr(name)).release().ptr();  // never released, as torch's types
    if (Py_TYPE(found) == &PyGetSetDescr_Type) {
      property_ = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
    } else {
      is_method_ = true;
      const PyMethodDef* method =
          Py_TYPE(found) == &PyMethodDescr_Type ? reinterpret_cast<PyMethodDescrObject*>(found)->d_method : nullptr;
      if (method != nullptr && method->ml_flags == METH_NOARGS) method_ = method->ml_meth;
    }
  }
  py::object of(PyObject* tensor, bool is_plain) const {
    if (is_plain && property_ != nullptr) return checked(property_->get(tensor, property_->closure));
    if (is_plain && method_ != nullptr) return checked(method_(tensor, nullptr));
    return checked(is_method_ ? PyObject_CallMethodNoArgs(tensor, name_) : PyObject_GetAttr(tensor, name_));
  }

 private:
  PyObject* name_;
  const PyGetSetDef* property_ = nullptr;
  PyCFunction method_ = nullptr;
  bool is_method_ = false;
};

// torch's types and its exchange functions, found when they are first needed.
struct Torch {
  const py::object type = py::module_::import("torch").attr("Tensor");
  PyTypeObject *tensor, *parameter;
  const DlExchange* exchange = nullptr;
  const Asked grad{type, "grad"}, version{type, "_version"}, layout{type, "layout"};
  const Asked requires_grad{type, "requires_grad"}, is_neg{type, "is_neg"};
  const PyObject* strided;

  Torch() {
    py::object of_models = py::module_::import("torch.nn").attr("Parameter");
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    tensor = reinterpret_cast<PyTypeObject*>(type.ptr());
    parameter = reinterpret_cast<PyTypeObject*>(of_models.release().ptr());
    exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (exchange == nullptr) throw py::error_already_set();
    if (exchange->major != 1) throw py::import_error("torch's DLPack is not of version 1");
    strided = py::object(py::module_::import("torch").attr("strided")).release().ptr();
  }

  bool is_plain(PyObject* object) const { return Py_TYPE(object) == tensor || Py_TYPE(object) == parameter; }

  bool look(PyObject* object, DlTensor& out) const {
    if (!is_plain(object)) return false;
    if (exchange->look(object, &out) == 0) return true;
    PyErr_Clear();
    return false;
  }
};

const Torch& torch() {
  static const Torch* instance = new Torch;  // never destroyed: Python may have gone before
  return *instance;
}

bool same_kind(const DlTensor& a, const DlTensor& b) {
  return a.device_type == b.device_type && a.device_id == b.device_id && a.code == b.code && a.bits == b.bits &&
         a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// An axis of one element may have any stride.
bool same_order(const DlTensor& a, const DlTensor& b) {
  for (int32_t d = 0; d < a.ndim; ++d) {
    if (a.strides[d] != b.strides[d] && a.shape[d] > 1) return false;
  }
  return true;
}

}  // namespace

Looks::Looks(py::list tensors) {
  size_t size = 0;
  looks_.resize(tensors.size());
  for (size_t i = 0; i < looks_.size(); ++i) {
    if (!torch().look(PyList_GET_ITEM(tensors.ptr(), i), looks_[i])) {
      throw py::value_error("not a tensor with memory of its own");
    }
    size += 2 * looks_[i].ndim;
  }
  extents_.reserve(size);
  for (DlTensor& look : looks_) {
    for (int64_t** from : {&look.shape, &look.strides}) {
      const int64_t* old = *from;
      *from = extents_.data() + extents_.size();
      extents_.insert(extents_.end(), old, old + look.ndim);
    }
  }
}

bool Looks::same(py::list tensors) const {
  if (tensors.size() != looks_.size()) return false;
  for (size_t i = 0; i < looks_.size(); ++i) {
    const DlTensor& then = looks_[i];
    DlTensor now;
    if (!torch().look(PyList_GET_ITEM(tensors.ptr(), i), now)) return false;
    if (now.data == nullptr || now.data != then.data || !same_kind(now, then)) return false;
    if (!std::equal(now.strides, now.strides + now.ndim, then.strides)) return false;
  }
  return true;
}

bool Looks::addresses(py::list tensors, int64_t table, int64_t columns, int64_t column) const {
  if (tensors.size() != looks_.size()) return false;
  auto* out = reinterpret_cast<int64_t*>(table) + column;
  for (size_t i = 0; i < looks_.size(); ++i, out += columns) {
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
    DlTensor now;
    if (!torch().look(tensor, now) || !same_kind(now, looks_[i]) || !same_order(now, looks_[i])) return false;
    if (torch().is_neg.of(tensor, true).ptr() != Py_False) return false;
    const bool empty = std::find(now.shape, now.shape + now.ndim, 0) != now.shape + now.ndim;
    if (now.data == nullptr && !empty) return false;  // zeros that torch has not made yet
    *out = reinterpret_cast<int64_t>(now.data);
  }
  return true;
}

py::object Looks::gradients(py::list params, py::list known) const {
  const size_t size = looks_.size();
  if (params.size() != size || known.size() != size) return py::none();
  for (size_t i = 0; i < size; ++i) {
    if (PyList_GET_ITEM(params.ptr(), i) != PyList_GET_ITEM(known.ptr(), i)) return py::none();
  }
  if (!same(params)) return py::none();
  py::list grads(size);
  for (size_t i = 0; i < size; ++i) {
    py::object grad = torch().grad.of(PyList_GET_ITEM(params.ptr(), i), true);
    if (Py_TYPE(grad.ptr()) != torch().tensor || torch().layout.of(grad.ptr(), true).ptr() != torch().strided) {
      return py::none();
    }
    PyList_SET_ITEM(grads.ptr(), i, grad.release().ptr());
  }
  return std::move(grads);
}

bool requires_grad(py::list tensors) {
  for (py::handle each : tensors) {
    if (torch().requires_grad.of(each.ptr(), torch().is_plain(each.ptr())).ptr() == Py_True) return true;
  }
  return false;
}

bool holds(py::dict states, py::list dicts, py::list objects) {
  const size_t count = objects.size();
  size_t i = 0, k = 0;
  if (states.size() != dicts.size()) return false;
  PyObject *key, *state, *value;
  for (Py_ssize_t at = 0; PyDict_Next(states.ptr(), &at, &key, &state); ++i) {
    if (state != PyList_GET_ITEM(dicts.ptr(), i) || !PyDict_Check(state)) return false;
    for (Py_ssize_t in = 0; PyDict_Next(state, &in, &key, &value); ++k) {
      if (k == count || value != PyList_GET_ITEM(objects.ptr(), k)) return false;
    }
  }
  return k == count;
}

void count(int64_t table, int64_t rows, int64_t columns, int64_t counted) {
  auto* row = reinterpret_cast<int64_t*>(table);
  for (int64_t i = 0; i < rows; ++i, row += columns) {
    for (int64_t k = 0; k < counted; ++k) ++row[k];
  }
}

bool any(int64_t numbers, int64_t size) {
  const auto* first = reinterpret_cast<const int64_t*>(numbers);
  return std::any_of(first, first + size, [](int64_t number) { return number != 0; });
}

py::tuple note_gradients(py::list tensors) {
  const size_t count = tensors.size();
  py::list references(count), versions(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
    const py::object grad = torch().grad.of(tensor, torch().is_plain(tensor));
    const bool none = grad.is_none();
    references[i] = none ? grad : checked(PyWeakref_NewRef(grad.ptr(), nullptr));
    try {
      versions[i] = none ? py::int_(-1) : torch().version.of(grad.ptr(), torch().is_plain(grad.ptr()));
    } catch (py::error_already_set& error) {  // torch does not count in inference mode
      if (!error.matches(PyExc_RuntimeError)) throw;
      versions[i] = py::int_(-2);
    }
  }
  return py::make_tuple(std::move(references), std::move(versions));
}

}  // namespace adahessian
