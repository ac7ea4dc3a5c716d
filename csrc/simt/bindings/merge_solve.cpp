// The kernels of merge_solve.cuh as functions of numpy arrays: immunize_ext_simt.merge_solve.
#include "../../cuda/merge_solve.cuh"

#include "../numpy.h"

namespace {

using namespace immunize_ext::merge;
using simt::Array;
using simt::Buffer;
using simt::py::arg;
namespace py = simt::py;

struct Results {
  Buffer<double> e, defect, factor, scale;
  Buffer<std::int64_t> rank;
  std::int64_t batch, s;

  Results(std::int64_t batch, std::int64_t s)
      : e("e", batch * s * s),
        defect("defect", batch * s * s),
        factor("factor", batch * s * s),
        scale("scale", batch * s),
        rank("rank", batch),
        batch(batch),
        s(s) {}
  Inverse inverse(double rank_rtol) const {
    return {e.ptr(), defect.ptr(), factor.ptr(), scale.ptr(), rank.ptr(), s, rank_rtol};
  }
  py::tuple numpy() const {
    return py::make_tuple(
        simt::to_numpy(e, {batch, s, s}), simt::to_numpy(defect, {batch, s, s}),
        simt::to_numpy(rank, {batch}));
  }
};

}  // namespace

SIMT_BINDINGS(merge_solve, m) {
  m.def(
      "invert",
      [](const Array<double>& t, double rank_rtol, std::uint64_t seed) {
        const Buffer<const double> in = simt::input("t", t);
        const Results results(t.shape(0), t.shape(1));
        launch_invert(results.inverse(rank_rtol), in.ptr(), t.shape(0), Stream{seed});
        return results.numpy();
      },
      arg("t").noconvert(), arg("rank_rtol"), arg("seed") = 0);
  m.def(
      "solve_small",
      [](const Array<double>& chol, const Array<double>& c, const Array<double>& inverse_hardness,
         double rank_rtol, std::uint64_t seed) {
        const std::int64_t batch = c.shape(0), s = c.shape(1), d = c.shape(2);
        const Buffer<const double> chol_in = simt::input("chol", chol);
        const Buffer<const double> c_in = simt::input("c", c);
        const Buffer<const double> hardness_in = simt::input("inverse_hardness", inverse_hardness);
        Buffer<double> a("a", batch * d * s), z("z", batch * s * d), t("t", batch * s * s);
        const Results results(batch, s);
        launch_solve_small(
            {chol_in.ptr(), c_in.ptr(), hardness_in.ptr(), a.ptr(), z.ptr(), t.ptr(), batch, d},
            results.inverse(rank_rtol), Stream{seed});
        return py::make_tuple(simt::to_numpy(a, {batch, d, s}), results.numpy());
      },
      arg("chol").noconvert(), arg("c").noconvert(), arg("inverse_hardness").noconvert(),
      arg("rank_rtol"), arg("seed") = 0);
  m.def(
      "is_small",
      [](std::int64_t d, std::int64_t s, std::size_t shared_limit) {
        return is_small(d, s, Stream{0, shared_limit});
      },
      arg("d"), arg("s"), arg("shared_limit") = Stream{}.shared_limit);
}
