// The kernel of the regularizers as a function of numpy arrays: immunize_ext_simt.regularizer.
#include "../../cuda/regularizer_launchers.h"

#include "../numpy.h"

namespace immunize_ext::regularizer {

IMMUNIZE_EXT_REGULARIZER_LAUNCHERS(SIMT_EXTERN, float);
IMMUNIZE_EXT_REGULARIZER_LAUNCHERS(SIMT_EXTERN, double);

}  // namespace immunize_ext::regularizer

namespace {

using namespace immunize_ext::regularizer;
using immunize_ext::RegularizerRules;
using simt::Array;
using simt::Buffer;
using simt::py::arg;

template <typename T>
void define(simt::py::module_& m, const char* name) {
  m.def(
      name,
      [](const Array<double>& extreme, const Array<double>& squares,
         const Array<std::int64_t>& rank, const Array<std::int64_t>& multiplicity, bool ill,
         double normaliser, double floor, double side, double vanishing, double least, double most,
         std::uint64_t seed) {
        const std::int64_t batch = extreme.size();
        const Buffer<const double> e = simt::input("extreme", extreme);
        const Buffer<const double> f = simt::input("squares", squares);
        const Buffer<const std::int64_t> r = simt::input("rank", rank);
        Buffer<std::int64_t> counts = simt::in_out("multiplicity", multiplicity);
        Buffer<T> value("value", batch);
        Buffer<double> weights("weights", 4 * batch);
        const Values<T> values{e.ptr(), f.ptr(), r.ptr(), counts.ptr(), value.ptr(), weights.ptr()};
        launch_regularizer_values<T>(
            values, RegularizerRules{ill, normaliser, floor, side, vanishing}, least, most, batch,
            simt::on({seed}));
        return simt::py::make_tuple(
            simt::to_numpy(value, {batch}), simt::to_numpy(weights, {batch, 4}),
            simt::to_numpy(counts, {batch}));
      },
      arg("extreme").noconvert(), arg("squares").noconvert(), arg("rank").noconvert(),
      arg("multiplicity").noconvert(), arg("ill"), arg("normaliser"), arg("floor"), arg("side"),
      arg("vanishing"), arg("least"), arg("most"), arg("seed") = 0);
}

}  // namespace

SIMT_BINDINGS(regularizer, m) {
  define<float>(m, "values_float32");
  define<double>(m, "values_float64");
}
