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
      "pivoted_cholesky",
      [](const Array<double>& t, double rank_rtol, std::uint64_t seed) {
        const std::int64_t batch = t.shape(0), s = t.shape(1);
        const Buffer<const double> in = simt::input("t", t);
        Buffer<double> triangle("triangle", batch * s * s), factor("factor", batch * s * s);
        Buffer<std::int64_t> order("order", batch * s), rank("rank", batch);
        launch_pivoted_cholesky(
            {in.ptr(), triangle.ptr(), order.ptr(), rank.ptr(), factor.ptr(), batch, s, rank_rtol},
            simt::on({seed}));
        return py::make_tuple(
            simt::to_numpy(triangle, {batch, s, s}), simt::to_numpy(order, {batch, s}),
            simt::to_numpy(rank, {batch}));
      },
      arg("t").noconvert(), arg("rank_rtol"), arg("seed") = 0);
}
