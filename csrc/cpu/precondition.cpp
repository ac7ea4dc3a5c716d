// Gradient times K^-1 on the input side, K = x^T x + ridge I, on the CPU.
//
// With the Cholesky factor of K (p x p): grad K^-1 by two triangular solves. With n < p samples the
// Woodbury identity needs only the factor of S = x x^T + ridge I (n x n):
//   K^-1 = (I - x^T S^-1 x) / ridge.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"

namespace immunize_ext {
namespace {

using at::Tensor;

Tensor precondition(
    const Tensor& grad,    // [*, o, p]
    const Tensor& factor,  // [p, p] or [n, n] float64, lower
    const Tensor& x,       // [n, p] float64
    double ridge,
    bool woodbury) {
  constexpr const char* op = "precondition";
  check_real_floating(op, "grad", grad);
  check_matrix(op, "grad", grad);
  check_dtype(op, "factor", factor, at::kDouble);
  const int64_t p = grad.size(-1), side = woodbury ? x.size(0) : p;
  check_shape(op, "factor", factor, {side, side});
  // float64 whatever the type of grad: K is squared in condition and the gradient is small.
  const Tensor flat = grad.to(at::kDouble).reshape({-1, p});
  Tensor result;
  if (woodbury) {
    check_dtype(op, "x", x, at::kDouble);
    check_shape(op, "x", x, {side, p});
    TORCH_CHECK_VALUE(
        ridge > 0.0, op,
        ": ridge must be positive with fewer samples than features, "
        "got ",
        ridge);
    const Tensor inner = at::cholesky_solve(x.mm(flat.mT()), factor);  // [n, o]
    result = (flat - inner.mT().mm(x)) / ridge;
  } else {
    result = at::cholesky_solve(flat.mT(), factor).mT();
  }
  return result.reshape(grad.sizes()).to(grad.scalar_type()).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("precondition", &precondition);
}

}  // namespace immunize_ext
