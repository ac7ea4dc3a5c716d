// The launch of the kernel of the regularizers; the operators stand in ../regularizer.cpp.

#include "../regularizer.h"

#include <ATen/cuda/CUDAContext.h>

#include "regularizer_launchers.h"

namespace immunize_ext::regularizer {

IMMUNIZE_EXT_REGULARIZER_LAUNCHERS(extern, float);
IMMUNIZE_EXT_REGULARIZER_LAUNCHERS(extern, double);

}  // namespace immunize_ext::regularizer

namespace immunize_ext {
namespace {

template <typename T>
void launch(const RegularizerTensors& t, const RegularizerRules& rules, double least, double most) {
  const regularizer::Values<T> values{
      t.extreme.const_data_ptr<double>(), t.squared_frobenius.const_data_ptr<double>(),
      t.rank.const_data_ptr<int64_t>(),   t.multiplicity.mutable_data_ptr<int64_t>(),
      t.value.mutable_data_ptr<T>(),      t.coefficients.mutable_data_ptr<double>()};
  regularizer::launch_regularizer_values<T>(
      values, rules, least, most, t.extreme.size(0), at::cuda::getCurrentCUDAStream());
}

}  // namespace

void regularizer_on_device(
    const RegularizerTensors& t, const RegularizerRules& rules, double least, double most) {
  if (t.value.scalar_type() == at::kDouble)
    launch<double>(t, rules, least, most);
  else
    launch<float>(t, rules, least, most);
}

}  // namespace immunize_ext
