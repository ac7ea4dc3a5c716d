// Gradient times K^-1 on the input side, K = x^T x + ridge I.
//
// With the Cholesky factor of K (p x p): grad K^-1 by two triangular solves. With n < p samples the
// Woodbury identity needs only the factor of S = x x^T + ridge I (n x n):
//   K^-1 = (I - x^T S^-1 x) / ridge.
// Two triangular solves and at most two products in float64 are all there is, so libraries do them
// on every device; with a small factor of K one kernel does all of it on CUDA (cuda/precondition.h).
// Nothing here waits for a GPU, and TF32 does not touch float64.

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#ifdef IMMUNIZE_EXT_WITH_CUDA
#include "cuda/precondition.h"
#endif

namespace immunize_ext {
namespace {

using at::Tensor;

// Rows of grad that are solved for at a time. Libraries put the right-hand sides into a grid
// dimension: from 524,281 on launches have failed, and this bounds the float64 workspace as well.
constexpr int64_t kRowsAtOnce = 65536;

Tensor precondition(
    const Tensor& grad,    // [*, o, p]
    const Tensor& factor,  // [p, p] or [n, n] float64, lower
    const Tensor& x,       // [n, p] float64; [0, p] unless woodbury
    double ridge,
    bool woodbury) {
  constexpr const char* op = "precondition";
  check_real_floating(op, "grad", grad);
  check_matrix(op, "grad", grad);
  check_dtype(op, "factor", factor, at::kDouble);
  check_same_device(op, "factor", factor, "grad", grad);
  check_dtype(op, "x", x, at::kDouble);
  check_same_device(op, "x", x, "grad", grad);
  const int64_t p = grad.size(-1);
  IMMUNIZE_CHECK(
      x.dim() == 2 && x.size(1) == p, op, "x", "have shape [n, p], p that of grad", x.sizes());
  const int64_t side = woodbury ? x.size(0) : p;
  check_shape(op, "factor", factor, {side, side});
  TORCH_CHECK_VALUE(
      ridge > 0.0 || !woodbury, op,
      ": ridge must be positive with fewer samples than features, got ", ridge);
  const c10::OptionalDeviceGuard guard(grad.device());
  const Tensor result = at::empty(grad.sizes(), grad.options());
  if (grad.numel() == 0)
    return result;
  const Tensor from = grad.reshape({-1, p}), to = result.view({-1, p});
#ifdef IMMUNIZE_EXT_WITH_CUDA
  if (!woodbury && precondition_small(from, factor, to))
    return result;
#endif
  for (int64_t begin = 0; begin < from.size(0); begin += kRowsAtOnce) {
    const int64_t end = std::min(begin + kRowsAtOnce, from.size(0));
    // float64 whatever the type of grad: K is squared in condition and the gradient is small.
    const Tensor rows = from.slice(0, begin, end).to(at::kDouble);
    if (woodbury) {
      const Tensor inner = at::cholesky_solve(x.mm(rows.mT()), factor);  // [n, rows]
      to.slice(0, begin, end).copy_((rows - inner.mT().mm(x)) / ridge);
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
