// The Python module immunize_ext_simt: one submodule for each file of bindings/. Built by build.py
// for tests only.
#include "numpy.h"

PYBIND11_MODULE(immunize_ext_simt, m) {
  m.doc() = "Runs the CUDA kernels of immunize_ext on the CPU, with checks.";
  pybind11::register_local_exception<simt::Error>(m, "SimtError", PyExc_RuntimeError);
  pybind11::register_local_exception<simt::LaunchError>(m, "LaunchError", PyExc_RuntimeError);
  for (const simt::Bindings& bindings : simt::all_bindings()) {
    pybind11::module_ submodule = m.def_submodule(bindings.stem);
    bindings.define(submodule);
  }
}
