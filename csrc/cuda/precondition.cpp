// Gradient times K^-1 on the input side, K = x^T x + ridge I, on a GPU; ops/fallback.py
// has the formulas. With a small factor of K one kernel does all of it (precondition.cuh). Else two
// triangular solves and at most two products in float64 are all there is, so cuSOLVER and cuBLAS do
// them. Nothing here waits for the GPU, and TF32 does not touch float64.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../checks.h"
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

// Rows of grad that are solved for at a time. Libraries put the right-hand sides into a grid
// dimension: from 524,281 on launches have failed, and this bounds the float64 workspace as well.
constexpr int64_t kRowsAtOnce = 65536;

template <typename T>
void solve_small(const Tensor& rows, const Tensor& factor, const Tensor& to) {
  precondition::launch_small_precondition<T>(
      static_cast<const T*>(rows.const_data_ptr()), factor.const_data_ptr<double>(),
      static_cast<T*>(to.mutable_data_ptr()), rows.size(0), static_cast<int>(rows.size(1)),
      at::cuda::getCurrentCUDAStream());
}

// Whether the kernel took it.
bool try_small(const Tensor& grad, const Tensor& factor, const Tensor& to) {
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

double epsilon_of(const Tensor& grad) {
  const at::ScalarType dtype = grad.scalar_type();
  return dtype == at::kDouble  ? 0x1p-52
         : dtype == at::kFloat ? 0x1p-23
         : dtype == at::kHalf  ? 0x1p-10
                               : 0x1p-7;
}

Tensor apply_inverse(
    const Tensor& grad,    // [*, o, p]
    const Tensor& factor,  // [p, p] or [n, n] float64, lower
    const Tensor& basis,   // [n, p] float64, orthonormal rows; [0, p] where the factor is that of K
    double ridge) {
  constexpr const char* op = "precondition";
  check_real_floating(op, "grad", grad);
  check_matrix(op, "grad", grad);
  check_dtype(op, "factor", factor, at::kDouble);
  check_same_device(op, "factor", factor, "grad", grad);
  const int64_t p = grad.size(-1), n = basis.size(0), side = n > 0 ? n : p;
  check_shape(op, "factor", factor, {side, side});
  if (n > 0) {
    check_dtype(op, "basis", basis, at::kDouble);
    check_shape(op, "basis", basis, {n, p});
    check_same_device(op, "basis", basis, "grad", grad);
    TORCH_CHECK_VALUE(
        ridge > 0.0, op, ": ridge must be positive with fewer samples than features, got ", ridge);
  }
  const c10::OptionalDeviceGuard guard(grad.device());
  Tensor result = at::empty(grad.sizes(), grad.options());
  if (grad.numel() == 0)
    return result;
  const Tensor from = grad.reshape({-1, p}), to = result.view({-1, p});
  if (n == 0 && try_small(from, factor, to))
    return result;
  for (int64_t begin = 0; begin < from.size(0); begin += kRowsAtOnce) {
    const int64_t end = std::min(begin + kRowsAtOnce, from.size(0));
    // float64 whatever the type of grad: K is squared in condition and the gradient is small.
    const Tensor rows = from.slice(0, begin, end).to(at::kDouble);
    if (n > 0) {
      const Tensor within = rows.mm(basis.mT());  // [rows, n]
      const Tensor beside = rows - within.mm(basis);
      // What rounding to the type of grad left beside the row space is no gradient.
      const double tolerance = 8.0 * std::sqrt(static_cast<double>(p)) * epsilon_of(grad);
      const Tensor rounding = beside.norm(2, 1, true) <= tolerance * rows.norm(2, 1, true);
      to.slice(0, begin, end)
          .copy_(
              at::cholesky_solve(within.mT(), factor).mT().mm(basis) +
              beside.masked_fill(rounding, 0.0) / ridge);
    } else {
      to.slice(0, begin, end).copy_(at::cholesky_solve(rows.mT(), factor).mT());
    }
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  m.impl("precondition", &apply_inverse);
}

}  // namespace immunize_ext
