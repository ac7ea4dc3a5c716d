// The kernels of merge_solve.cuh as functions of numpy arrays: immunize_ext_simt.merge_solve.
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
      [](const Array<double>& gram, const Array<double>& inverse_hardness, double rank_rtol,
         std::uint64_t seed) {
        const std::int64_t batch = gram.shape(0), s = gram.shape(1);
        const Buffer<const double> soft = simt::input("inverse_hardness", inverse_hardness);
        Buffer<double> t = simt::in_out("t", gram);
        Buffer<double> triangle("triangle", batch * s * s), factor("factor", batch * s * s);
        Buffer<std::int64_t> order("order", batch * s), rank("rank", batch);
        launch_pivoted_cholesky(
            {t.ptr(), soft.ptr(), triangle.ptr(), order.ptr(), rank.ptr(), factor.ptr(), batch, s,
             rank_rtol},
            simt::on({seed}));
        return py::make_tuple(
            simt::to_numpy(triangle, {batch, s, s}), simt::to_numpy(order, {batch, s}),
            simt::to_numpy(rank, {batch}), simt::to_numpy(t, {batch, s, s}));
      },
      arg("gram").noconvert(), arg("inverse_hardness").noconvert(), arg("rank_rtol"),
      arg("seed") = 0);
  m.def(
      "orthonormalise",
      [](const Array<double>& z, const Array<double>& inverse_hardness,
         const Array<double>& triangle, const Array<std::int64_t>& order,
         const Array<std::int64_t>& rank, std::uint64_t seed) {
        const std::int64_t batch = z.shape(0), s = z.shape(1), d = z.shape(2);
        const auto in = simt::input("z", z);
        const auto soft = simt::input("inverse_hardness", inverse_hardness);
        const auto factor = simt::input("triangle", triangle);
        const auto places = simt::input("order", order), ranks = simt::input("rank", rank);
        Buffer<double> first("first", batch * s * (d + s)), inverse("inverse", batch * s * s);
        launch_orthonormalise(
            {in.ptr(), soft.ptr(), factor.ptr(), places.ptr(), ranks.ptr(), first.ptr(),
             inverse.ptr(), batch, s, d},
            simt::on({seed}));
        return py::make_tuple(
            simt::to_numpy(first, {batch, s, d + s}), simt::to_numpy(inverse, {batch, s, s}));
      },
      arg("z").noconvert(), arg("inverse_hardness").noconvert(), arg("triangle").noconvert(),
      arg("order").noconvert(), arg("rank").noconvert(), arg("seed") = 0);
  m.def(
      "finish_root",
      [](const Array<double>& gram, const Array<double>& inverse, const Array<double>& t,
         const Array<std::int64_t>& order, const Array<std::int64_t>& rank, std::uint64_t seed) {
        const std::int64_t batch = t.shape(0), s = t.shape(1), size = batch * s * s;
        const auto in = simt::input("gram", gram), left = simt::input("inverse", inverse);
        const auto whole = simt::input("t", t);
        const auto places = simt::input("order", order);
        Buffer<std::int64_t> ranks = simt::in_out("rank", rank);
        Buffer<double> correction("correction", size), root("root", size), defect("defect", size);
        Buffer<double> scratch("scratch", 3 * size);
        launch_finish_root(
            {in.ptr(), left.ptr(), whole.ptr(), places.ptr(), ranks.ptr(), correction.ptr(),
             root.ptr(), defect.ptr(), scratch.ptr(), batch, s},
            simt::on({seed}));
        return py::make_tuple(
            simt::to_numpy(correction, {batch, s, s}), simt::to_numpy(root, {batch, s, s}),
            simt::to_numpy(defect, {batch, s, s}), simt::to_numpy(ranks, {batch}));
      },
      arg("gram").noconvert(), arg("inverse").noconvert(), arg("t").noconvert(),
      arg("order").noconvert(), arg("rank").noconvert(), arg("seed") = 0);
}
