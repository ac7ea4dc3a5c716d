// The kernel of merge_solve.cuh as a function of numpy arrays: immunize_ext_simt.merge_solve.
#include "../../cuda/merge_solve.cuh"

#include "../numpy.h"

namespace {

using namespace immunize_ext::merge;
using simt::Array;
using simt::Buffer;
using simt::py::arg;
namespace py = simt::py;

}  // namespace

SIMT_BINDINGS(merge_solve, m) {
  m.def(
      "root",
      [](const Array<double>& t, double rank_rtol, std::uint64_t seed) {
        const std::int64_t batch = t.shape(0), s = t.shape(1);
        const Buffer<const double> in = simt::input("t", t);
        Buffer<double> root("root", batch * s * s), factor("factor", batch * s * s);
        Buffer<double> scale("scale", batch * s);
        Buffer<std::int64_t> rank("rank", batch);
        launch_root(
            {root.ptr(), factor.ptr(), scale.ptr(), rank.ptr(), s, rank_rtol}, in.ptr(), batch,
            Stream{seed});
        return py::make_tuple(
            simt::to_numpy(root, {batch, s, s}), simt::to_numpy(rank, {batch}));
      },
      arg("t").noconvert(), arg("rank_rtol"), arg("seed") = 0);
}
