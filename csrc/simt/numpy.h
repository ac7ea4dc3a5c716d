// Between numpy arrays and the buffers of a simulated launch; and how a binding file announces
// itself. Only for csrc/simt/bindings/*.cpp, which are compiled twice: with kernels that g++ compiled
// for the executor, and with launchers and kernels that nvcc compiled (ptx/).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#if defined(IMMUNIZE_EXT_WITH_CUDA)
#include "ptx/buffer.h"
#else
#include "simt.h"
#endif

namespace simt {

#if !defined(IMMUNIZE_EXT_WITH_CUDA)
// The stream on which launches go to `device`.
inline Stream on(const Device& device) {
  return device;
}
#endif

namespace py = pybind11;

// Pass with py::arg("x").noconvert(), so that float32 and float64 choose their own overload.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// What kernels may only read. `shift` elements of misalignment stand for a sliced tensor.
template <typename T>
Buffer<const T> input(const std::string& name, const Array<T>& array, std::int64_t shift = 0) {
  return Buffer<const T>(name, array.data(), array.size(), shift);
}

// A copy that kernels may read and change.
template <typename T>
Buffer<T> in_out(const std::string& name, const Array<T>& array, std::int64_t shift = 0) {
  return Buffer<T>(name, array.data(), array.size(), shift);
}

// The result as an array. Throws when the kernels left an element unwritten.
template <typename T>
Array<T> to_numpy(const Buffer<T>& buffer, const std::vector<py::ssize_t>& shape) {
  const std::int64_t unwritten = buffer.first_unwritten();
  if (unwritten >= 0) {
    throw Error(
        "no kernel wrote " + buffer.name() + "[" + std::to_string(unwritten) + "] of " +
        std::to_string(buffer.size()) + " elements");
  }
  Array<T> array(shape);
  if (array.size() != buffer.size()) {
    throw Error(
        buffer.name() + " has " + std::to_string(buffer.size()) + " elements, the shape " +
        std::to_string(array.size()));
  }
  std::copy_n(buffer.data(), buffer.size(), array.mutable_data());
  return array;
}

// The functions of one binding file become the submodule `stem`.
struct Bindings {
  const char* stem;
  void (*define)(py::module_& m);
};
inline std::vector<Bindings>& all_bindings() {
  static std::vector<Bindings> bindings;
  return bindings;
}

}  // namespace simt

// The prefix of launchers: those that nvcc compiled are declared, others instantiated.
#if defined(IMMUNIZE_EXT_WITH_CUDA)
#define SIMT_EXTERN extern
#else
#define SIMT_EXTERN
#endif

// SIMT_BINDINGS(row_sum, m) { m.def(...); } in csrc/simt/bindings/row_sum.cpp.
#define SIMT_BINDINGS(stem, m)                                          \
  static void define_##stem(::pybind11::module_& m);                    \
  static const bool announced_##stem =                                  \
      (::simt::all_bindings().push_back({#stem, define_##stem}), true); \
  static void define_##stem(::pybind11::module_& m)
