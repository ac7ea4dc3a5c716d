// The precondition kernel as a function of numpy arrays: immunize_ext_simt.precondition.
#include "../../cuda/precondition_launchers.h"

#include "../numpy.h"

namespace immunize_ext::precondition {

IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(SIMT_EXTERN, float);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(SIMT_EXTERN, double);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(SIMT_EXTERN, Half);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(SIMT_EXTERN, BFloat16);

}  // namespace immunize_ext::precondition

namespace {

using namespace immunize_ext::precondition;
using immunize_ext::BFloat16;
using immunize_ext::Half;
using simt::Array;
using simt::Buffer;
using simt::py::arg;

// T: as stored; N: as numpy holds it.
template <typename T, typename N>
void define(simt::py::module_& m, const char* name) {
  m.def(
      name,
      [](const Array<N>& grad, const Array<double>& factor, std::int64_t shift, int processors,
         std::uint64_t seed) {
        const std::int64_t rows = grad.shape(0);
        const int side = static_cast<int>(grad.shape(1));
        const Buffer<const N> in = simt::input("grad", grad, shift);
        const Buffer<const double> left = simt::input("factor", factor);
        Buffer<N> result("result", grad.size());
        simt::Device device{seed};
        device.multiprocessor_count = processors;
        launch_small_precondition<T>(
            simt::pointer_cast<const T>(in.ptr()), left.ptr(), simt::pointer_cast<T>(result.ptr()),
            rows, side, simt::on(device));
        return simt::to_numpy(result, {rows, side});
      },
      arg("grad").noconvert(), arg("factor").noconvert(), arg("shift") = 0, arg("processors") = 2,
      arg("seed") = 0);
}

}  // namespace

SIMT_BINDINGS(precondition, m) {
  define<float, float>(m, "small_float32");
  define<double, double>(m, "small_float64");
  define<Half, std::uint16_t>(m, "small_float16");
  define<BFloat16, std::uint16_t>(m, "small_bfloat16");
  m.def(
      "is_small",
      [](std::int64_t side, std::size_t device_limit) {
        return is_small(side, simt::on({0, device_limit}));
      },
      arg("side"), arg("device_limit") = simt::Device{}.shared_limit);
}
