// Gradient times K^-1 on the input side, K = x^T x + ridge I.
//
// With the Cholesky factor of K (p x p): grad K^-1 by two triangular solves. With n < p samples,
// within their row space by the factor of K there, in an orthonormal basis of n rows, and divided by
// the ridge beside it; ops/fallback.py has the derivation. Triangular solves and at most two products
// in float64 are all there is, so libraries do them on every device; with a small factor of K one
// kernel does all of it on CUDA (cuda/precondition.h). Nothing here waits for a GPU, and TF32 does
// not touch float64.

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "tensors.h"
#ifdef IMMUNIZE_EXT_WITH_CUDA
#include "cuda/precondition.h"
#endif

namespace immunize_ext {
namespace {

using at::Tensor;

// Rows of grad that are solved for at a time. Libraries put the right-hand sides into a grid
// dimension: from 524,281 on launches have failed, and this bounds the float64 workspace as well.
constexpr int64_t kRowsAtOnce = 65536;

double epsilon_of(const Tensor& grad) {
  const at::ScalarType dtype = grad.scalar_type();
  return dtype == at::kDouble  ? 0x1p-52
         : dtype == at::kFloat ? 0x1p-23
         : dtype == at::kHalf  ? 0x1p-10
                               : 0x1p-7;
}

Tensor precondition(
    const Tensor& grad,    // [*, o, p]
    const Tensor& factor,  // [p, p] or [n, n] float64, lower
    const Tensor& basis,   // [n, p] float64, orthonormal rows; [0, p] where the factor is that of K
    double ridge) {
  constexpr const char* op = "precondition";
  check_real_floating(op, "grad", grad);
  check_matrix(op, "grad", grad);
  check_dtype(op, "factor", factor, at::kDouble);
  check_same_device(op, "factor", factor, "grad", grad);
  check_dtype(op, "basis", basis, at::kDouble);
  check_same_device(op, "basis", basis, "grad", grad);
  const int64_t p = grad.size(-1);
  IMMUNIZE_CHECK(
      basis.dim() == 2 && basis.size(1) == p, op, "basis", "have shape [n, p], p that of grad",
      basis.sizes());
  const int64_t n = basis.size(0), side = n > 0 ? n : p;
  check_shape(op, "factor", factor, {side, side});
  TORCH_CHECK_VALUE(
      ridge > 0.0 || n == 0, op, ": ridge must be positive with fewer samples than features, got ",
      ridge);
  const c10::OptionalDeviceGuard guard(grad.device());
  const Tensor result = at::empty(grad.sizes(), grad.options());
  if (grad.numel() == 0)
    return result;
  const Tensor from = grad.reshape({-1, p}), to = result.view({-1, p});
#ifdef IMMUNIZE_EXT_WITH_CUDA
  if (n == 0 && precondition_small(from, factor, to))
    return result;
#endif
  for (int64_t begin = 0; begin < from.size(0); begin += kRowsAtOnce) {
    const int64_t end = std::min(begin + kRowsAtOnce, from.size(0));
    // float64 whatever the type of grad: K is squared in condition and the gradient is small.
    const Tensor rows = from.slice(0, begin, end).to(at::kDouble);
    if (n > 0) {
      const Tensor within = rows.mm(basis.mT());  // [rows, n]
      const Tensor beside = rows - within.mm(basis);
      // What rounding to the type of grad left beside the row space is no gradient.
      const double tolerance = 8.0 * std::sqrt(static_cast<double>(p)) * epsilon_of(grad);
      // Squares of rows of any scale.
      const Tensor unit = power_of_two_scale(rows.abs().amax(1, true));
      const Tensor rounding =
          (beside / unit).norm(2, 1, true) <= tolerance * (rows / unit).norm(2, 1, true);
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

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("precondition", &precondition);
}

TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  m.impl("precondition", &precondition);
}

}  // namespace immunize_ext
