// The kernels of triangular.cuh as a function of numpy arrays: immunize_ext_simt.triangular.
#include "../../cuda/triangular.cuh"

#include "../numpy.h"

namespace {

using namespace immunize_ext::triangular;
using simt::Array;
using simt::Buffer;
using simt::py::arg;

}  // namespace

SIMT_BINDINGS(triangular, m) {
  m.def(
      "solve",
      [](const Array<double>& factor, const Array<double>& rhs, bool transposed, bool columns,
         std::uint64_t seed, std::int64_t width) {
        const std::int64_t batch = factor.shape(0), d = factor.shape(1);
        const std::int64_t s = rhs.shape(columns ? 2 : 1);
        const Buffer<const double> l = simt::input("factor", factor), f = simt::input("rhs", rhs);
        Buffer<double> out("out", batch * s * d), scratch("scratch", width < d ? batch * s * d : 0);
        const RightHandSides given{f.ptr(), columns ? s : 1, columns ? 1 : d, s * d};
        launch_solve_triangular(
            {l.ptr(), given, out.ptr(), scratch.ptr(), batch, s, d}, transposed, width,
            simt::on({seed}));
        return simt::to_numpy(out, {batch, s, d});
      },
      arg("factor").noconvert(), arg("rhs").noconvert(), arg("transposed"), arg("columns"),
      arg("seed") = 0, arg("width") = 1024);
  m.def("panel_width", &panel_width);
  m.def("solve_bytes", &solve_bytes);
  m.attr("TILE") = kTile;
  m.attr("RIGHT_HAND_SIDES") = kSolvers;
}
