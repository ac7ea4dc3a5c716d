// The launch of the small kernel; the operator stands in ../precondition.cpp.

#include "precondition.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

#include "precondition_launchers.h"

namespace immunize_ext::precondition {

IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(extern, float);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(extern, double);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(extern, Half);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(extern, BFloat16);

}  // namespace immunize_ext::precondition

namespace immunize_ext {
namespace {

using at::Tensor;

template <typename T>
void solve_small(const Tensor& rows, const Tensor& factor, const Tensor& to) {
  precondition::launch_small_precondition<T>(
      static_cast<const T*>(rows.const_data_ptr()), factor.const_data_ptr<double>(),
      static_cast<T*>(to.mutable_data_ptr()), rows.size(0), static_cast<int>(rows.size(1)),
      at::cuda::getCurrentCUDAStream());
}

}  // namespace

bool precondition_small(const Tensor& grad, const Tensor& factor, const Tensor& to) {
  if (!grad.is_cuda() || !precondition::is_small(grad.size(1), at::cuda::getCurrentCUDAStream()))
    return false;
  const Tensor rows = grad.contiguous(), left = factor.contiguous();
  switch (grad.scalar_type()) {
    case at::kFloat:
      solve_small<float>(rows, left, to);
      return true;
    case at::kDouble:
      solve_small<double>(rows, left, to);
      return true;
    case at::kHalf:
      solve_small<Half>(rows, left, to);
      return true;
    case at::kBFloat16:
      solve_small<BFloat16>(rows, left, to);
      return true;
    default:
      return false;
  }
}

}  // namespace immunize_ext
