// The Python module object immunize_ext._C. Importing it loads this library, whose static
// initialisers register the operators (their schemas stand in ops/operators.py); the module itself
// says how the library was built and what it does here. The macros come from setup.py.

#include <ATen/Config.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/instructions.h"
#include "cpu/pool.h"
#include "rules.h"

#ifdef IMMUNIZE_EXT_WITH_CUDA
#include <cuda_runtime_api.h>  // CUDART_VERSION
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

bool parallel_for_is_parallel() {
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
  return false;  // at::parallel_for was compiled without -fopenmp and runs on one thread
#else
  return true;
#endif
}

py::object cuda_version() {
#ifdef IMMUNIZE_EXT_WITH_CUDA
  const int major = CUDART_VERSION / 1000;
  const int minor = CUDART_VERSION % 1000 / 10;
  return py::str(std::to_string(major) + "." + std::to_string(minor));
#else
  return py::none();
#endif
}

// "8.0;9.0+PTX" -> ["8.0", "9.0+PTX"]
py::list cuda_arch_list() {
  py::list result;
  std::string entry;
  for (const char c : std::string(IMMUNIZE_EXT_CUDA_ARCH_LIST) + ";") {
    if (c != ';' && c != ' ') {
      entry += c;
    } else if (!entry.empty()) {
      result.append(py::str(entry));
      entry.clear();
    }
  }
  return result;
}

py::dict build_info() {
  py::dict info;
  info["package"] = IMMUNIZE_EXT_VERSION;
  info["torch"] = IMMUNIZE_EXT_TORCH_VERSION;
  info["cuda"] = cuda_version();
  info["cuda_arch_list"] = cuda_arch_list();
  info["python"] = PY_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["parallel"] = parallel_for_is_parallel();
  return info;
}

std::string instructions() {
  return immunize_ext::name_of(immunize_ext::instructions());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of immunize_ext; they are reached through torch.ops.immunize_ext.";
  m.def(
      "build_info", &build_info,
      "Versions, compiler and GPU architectures that this library was built with, as a dict.");
  m.def(
      "instructions", &instructions,
      "Instruction set of the CPU kernels in this process: baseline, avx2 or avx512.");
  m.def(
      "ask_before_rules", &immunize_ext::ask_before_rules,
      "Serve an operator on CPU and CUDA without Python where nothing is differentiated.");
  m.def("cached_bytes", &immunize_ext::pool::waiting, "Bytes that wait for the next large output.");
  m.def(
      "empty_cache", &immunize_ext::pool::empty, "Give them back to the system; returns how many.");
  instructions();  // a setting that cannot be followed fails here, not inside of a kernel
}
