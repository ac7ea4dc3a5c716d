// Double backward of the spectrum operators on CUDA: a composition of ATen operators over the whole
// batch. Derivation: cpu/spectrum_double_backward.cpp.
//
// For a simple sigma_i, with Z the cotangent of grad_A, x = U^T Z v, y = V^T Z^T u,
//   d(u^T Z v)/dA = (U a + (I - U U^T) Z v / s_i) v^T + u (V b + (I - V V^T) Z^T u / s_i)^T,
//   a_j = (s_i x_j + s_j y_j) / (s_i^2 - s_j^2),  b_j = (s_j x_j + s_i y_j) / (s_i^2 - s_j^2).
// It waits for the device, to refuse clusters and what is not finite, as linalg_svd does anyway.

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../tensors.h"

namespace immunize_ext {
namespace {

using at::Tensor;

struct Decomposition {
  Tensor u, sigma, vh;  // [batch, n, t], [batch, t], [batch, t, p] of a / scale
  Tensor matrices, z;   // [batch, n, p]: a / scale, and the cotangent
  Tensor scale;         // [batch]
};

// One extreme of each matrix.
struct Extreme {
  Tensor index;    // [batch] into sigma, 0 where there is none
  Tensor members;  // [batch, t] float64: 1 in the cluster
  Tensor count;    // [batch] float64: its size, 0 where the gradient is zero
};

struct Extremes {
  Extreme max, min;
};

Decomposition decompose(
    const char* op, const char* name, const Tensor& a, const Tensor& cotangent) {
  check_floating_matrix(op, name, a);
  check_same_device(op, "cotangent", cotangent, name, a);
  check_shape(op, "cotangent", cotangent, a.sizes());
  const int64_t n = a.size(-2), p = a.size(-1), batch = a.numel() / (n * p);
  Decomposition d;
  const Tensor flat = a.to(at::kDouble).reshape({batch, n, p});
  d.z = cotangent.to(at::kDouble).reshape({batch, n, p});
  const Tensor largest = flat.abs().amax({1, 2});
  const Tensor bad = largest.isfinite().logical_not().nonzero().cpu();
  TORCH_CHECK_VALUE(
      bad.numel() == 0, op, ": ", name, " must be finite, got NaN or infinity at batch index ",
      bad.const_data_ptr<int64_t>()[0],
      "; look for an overflow upstream, float16 features for instance");
  d.scale = power_of_two_scale(largest);
  d.matrices = flat / d.scale.view({-1, 1, 1});
  std::tie(d.u, d.sigma, d.vh) = at::linalg_svd(d.matrices, /*full_matrices=*/false);
  return d;
}

Extremes find_extremes(
    const Tensor& sigma, int64_t full_side, double rank_rtol, double cluster_rtol, bool full_rank) {
  const Tensor top = sigma.narrow(1, 0, 1);
  const Tensor counts = sigma > top * rank_rtol;
  const Tensor rank = counts.sum(1);
  const Tensor near = top * cluster_rtol;
  const auto extreme = [&](const Tensor& index, const Tensor& exists) {
    const Tensor value = sigma.gather(1, index.unsqueeze(1));
    const Tensor members =
        counts.logical_and((sigma - value).abs() <= near).logical_and(exists.unsqueeze(1));
    return Extreme{index, members.to(at::kDouble), members.sum(1).to(at::kDouble)};
  };
  Extremes found;
  found.max = extreme(at::zeros_like(rank), rank > 0);
  const Tensor has_min = full_rank ? rank >= full_side : rank > 0;
  found.min = extreme((rank - 1).clamp_min(0), has_min);
  return found;
}

void check_simple(const char* op, const char* which, const Tensor& grad, const Extreme& extreme) {
  const Tensor refused = (extreme.count > 1).logical_and(grad != 0);
  const Tensor at = refused.nonzero().cpu();
  if (at.numel() == 0) {
    return;
  }
  const int64_t b = at.const_data_ptr<int64_t>()[0];
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op, ": the second derivative of ", which, " does not exist at batch index ", b,
      ", where it is repeated (multiplicity ", extreme.count[b].item<double>(),
      "); use the first derivative there, or a smaller cluster_rtol");
}

Tensor outer_product(const Tensor& left, const Tensor& right) {
  return left.unsqueeze(2) * right.unsqueeze(1);
}

Tensor times(const Tensor& matrices, const Tensor& vectors) {
  return at::bmm(matrices, vectors.unsqueeze(2)).squeeze(2);
}

Tensor column(const Tensor& matrices, const Tensor& index) {
  const auto size = matrices.size(1);
  return matrices.gather(2, index.view({-1, 1, 1}).expand({-1, size, 1})).squeeze(2);
}

// mean over the cluster of f(sigma_i) <Z, u_i v_i^T>, f = 1 or f = sigma.
Tensor mean_along(const Decomposition& d, const Extreme& extreme, bool times_sigma) {
  const Tensor along = (at::bmm(d.u.mT(), d.z) * d.vh).sum(2);
  const Tensor weight = times_sigma ? extreme.members * d.sigma : extreme.members;
  return (weight * along).sum(1) / extreme.count.clamp_min(1.0);
}

struct SecondDerivative {
  Tensor value;   // [batch, n, p], zero where inactive
  Tensor u, v;    // [batch, n], [batch, p]
  Tensor sigma;   // [batch]
  Tensor along;   // [batch], u^T Z v
  Tensor active;  // [batch]
};

SecondDerivative second_derivative(
    const Decomposition& d, const Extreme& extreme, const Tensor& grad) {
  SecondDerivative s;
  const Tensor v_all = d.vh.mT();
  s.u = column(d.u, extreme.index);
  s.v = column(v_all, extreme.index);
  s.sigma = d.sigma.gather(1, extreme.index.unsqueeze(1)).squeeze(1);
  s.active = (extreme.count == 1).logical_and(grad != 0);
  const Tensor zv = times(d.z, s.v), ztu = times(d.z.mT(), s.u);
  const Tensor x = times(d.u.mT(), zv), y = times(d.vh, ztu);
  s.along = (s.u * zv).sum(1);
  const Tensor s_i = s.sigma.unsqueeze(1);
  // The product neither cancels nor overflows. Where it is zero, j = i or nothing is active.
  const Tensor gap = (s_i - d.sigma) * (s_i + d.sigma);
  const Tensor self = at::arange(d.sigma.size(1), extreme.index.options()).unsqueeze(0) ==
                      extreme.index.unsqueeze(1);
  const Tensor skip = self.logical_or(s.active.logical_not().unsqueeze(1));
  const Tensor divisor = gap.masked_fill(skip, std::numeric_limits<double>::infinity());
  const Tensor a = (s_i * x + d.sigma * y) / divisor;
  const Tensor b = (d.sigma * x + s_i * y) / divisor;
  const Tensor safe =
      s.sigma.masked_fill(s.active.logical_not(), std::numeric_limits<double>::infinity())
          .unsqueeze(1);
  Tensor left = times(d.u, a), right = times(v_all, b);
  // A square U or V has no complement: what the difference leaves is rounding over sigma_i.
  if (d.u.size(1) > d.u.size(2))
    left = left + (zv - times(d.u, x)) / safe;
  if (v_all.size(1) > v_all.size(2))
    right = right + (ztu - times(v_all, y)) / safe;
  s.value = outer_product(left, s.v) + outer_product(s.u, right);
  return s;
}

Tensor per_matrix(const Tensor& numbers) {
  return numbers.view({-1, 1, 1});
}

Tensor flat_grad(const char* op, const char* name, const Tensor& grad, const Tensor& a) {
  check_same_device(op, name, grad, "the matrices", a);
  return grad.to(at::kDouble).reshape({a.numel() / (a.size(-2) * a.size(-1))});
}

std::tuple<Tensor, Tensor, Tensor> extremal_singular_values_double_backward(
    const Tensor& cotangent,  // [*, n, p]
    const Tensor& grad_max,
    const Tensor& grad_min,
    const Tensor& a,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "extremal_singular_values_double_backward";
  const c10::OptionalDeviceGuard guard(a.device());
  if (a.numel() == 0 && a.dim() >= 2) {
    check_floating_matrix(op, "a", a);
    return {
        at::zeros_like(grad_max, at::kDouble), at::zeros_like(grad_min, at::kDouble),
        at::zeros_like(a, a.options(), at::MemoryFormat::Contiguous)};
  }
  const Decomposition d = decompose(op, "a", a, cotangent);
  const Tensor g_max = flat_grad(op, "grad_max", grad_max, a);
  const Tensor g_min = flat_grad(op, "grad_min", grad_min, a);
  const Extremes found =
      find_extremes(d.sigma, std::min(a.size(-2), a.size(-1)), rank_rtol, cluster_rtol, full_rank);
  check_simple(op, "sigma_max", g_max, found.max);
  check_simple(op, "sigma_min", g_min, found.min);
  const SecondDerivative top = second_derivative(d, found.max, g_max);
  const SecondDerivative bottom = second_derivative(d, found.min, g_min);
  // u and v are of degree 0 in A: their derivative scales with the inverse of A's scale.
  const auto weight = [&d](const SecondDerivative& s, const Tensor& grad) {
    return per_matrix((grad / d.scale).masked_fill(s.active.logical_not(), 0.0));
  };
  const Tensor grad = top.value * weight(top, g_max) + bottom.value * weight(bottom, g_min);
  const auto shape = a.sizes().slice(0, a.dim() - 2);
  return {
      mean_along(d, found.max, false).reshape(shape),
      mean_along(d, found.min, false).reshape(shape), grad.reshape(a.sizes()).to(a.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gram_extremes_double_backward(
    const Tensor& cotangent,  // [*, n, p]
    const Tensor& grad_max,
    const Tensor& grad_min,
    const Tensor& grad_squared_frobenius,
    const Tensor& x,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  // grad_x = 2 g_max s_1 u_1 v_1^T + 2 g_min s_k u_k v_k^T + 4 g_F x x^T x: with d s = u^T dx v the
  // product rule adds 2 g <Z, u v^T> u v^T to 2 g s times the second derivative of s; the last term
  // gives 4 g_F (Z x^T x + x Z^T x + x x^T Z).
  constexpr const char* op = "gram_extremes_double_backward";
  const c10::OptionalDeviceGuard guard(x.device());
  if (x.numel() == 0 && x.dim() >= 2) {
    check_floating_matrix(op, "x", x);
    return {
        at::zeros_like(grad_max, at::kDouble), at::zeros_like(grad_min, at::kDouble),
        at::zeros_like(grad_squared_frobenius, at::kDouble),
        at::zeros_like(x, x.options(), at::MemoryFormat::Contiguous)};
  }
  const Decomposition d = decompose(op, "x", x, cotangent);
  const Tensor g_max = flat_grad(op, "grad_max", grad_max, x);
  const Tensor g_min = flat_grad(op, "grad_min", grad_min, x);
  const Tensor g_f = flat_grad(op, "grad_squared_frobenius", grad_squared_frobenius, x);
  const Extremes found = find_extremes(d.sigma, x.size(-1), rank_rtol, cluster_rtol, full_rank);
  check_simple(op, "lambda_max", g_max, found.max);
  check_simple(op, "lambda_min", g_min, found.min);
  const auto term = [&d](const Extreme& extreme, const Tensor& grad) {
    const SecondDerivative s = second_derivative(d, extreme, grad);
    const Tensor weight = (2.0 * grad).masked_fill(s.active.logical_not(), 0.0);
    return per_matrix(weight) *
           (s.value * per_matrix(s.sigma) + outer_product(s.u * s.along.unsqueeze(1), s.v));
  };
  const Tensor& m = d.matrices;
  const bool wide = x.size(-2) <= x.size(-1);
  const Tensor thin = wide ? at::bmm(m, m.mT()) : at::bmm(m.mT(), m);
  const Tensor cubic = wide ? at::bmm(thin, m) : at::bmm(m, thin);  // x x^T x
  const Tensor mixed = wide ? at::bmm(at::bmm(m, d.z.mT()), m) : at::bmm(m, at::bmm(d.z.mT(), m));
  const Tensor others = wide ? at::bmm(at::bmm(d.z, m.mT()), m) + at::bmm(thin, d.z)
                             : at::bmm(d.z, thin) + at::bmm(m, at::bmm(m.mT(), d.z));
  const Tensor grad = term(found.max, g_max) + term(found.min, g_min) +
                      (mixed + others) * per_matrix(4.0 * g_f * d.scale.square());
  const auto shape = x.sizes().slice(0, x.dim() - 2);
  return {
      (mean_along(d, found.max, true) * (2.0 * d.scale)).reshape(shape),
      (mean_along(d, found.min, true) * (2.0 * d.scale)).reshape(shape),
      ((d.z * cubic).sum({1, 2}) * (4.0 * d.scale.pow(3))).reshape(shape),
      grad.reshape(x.sizes()).to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  m.impl("extremal_singular_values_double_backward", &extremal_singular_values_double_backward);
  m.impl("gram_extremes_double_backward", &gram_extremes_double_backward);
}

}  // namespace immunize_ext
