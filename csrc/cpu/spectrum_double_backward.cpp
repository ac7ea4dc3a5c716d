// Second derivatives of extreme singular values, where they are simple.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "spectrum_common.h"

namespace immunize_ext {
namespace {

// Second derivative of a simple singular value. For the scalar L = g u^T Z v,
//   du = sum_{j != i} u_j (s_i u_j^T dA v + s_j u^T dA v_j) / (s_i^2 - s_j^2) + (I - U U^T) dA v /
//   s_i dv = sum_{j != i} v_j (s_j u_j^T dA v + s_i u^T dA v_j) / (s_i^2 - s_j^2) + (I - V V^T)
//   dA^T u / s_i
// and dL = g (du^T Z v + u^T Z dv). With x = U^T Z v, y = V^T Z^T u, collecting the coefficients of
// u_j^T dA v and of u^T dA v_j gives
//   dL/dA = g [ (U a + (I - U U^T) Z v / s_i) v^T + u (V b + (I - V V^T) Z^T u / s_i)^T ],
//   a_j = (s_i x_j + s_j y_j) / (s_i^2 - s_j^2),  b_j = (s_j x_j + s_i y_j) / (s_i^2 - s_j^2).
// The denominator is the product (s_i - s_j)(s_i + s_j), which neither cancels nor overflows.
Tensor simple_second_derivative(const Decomposition& d, int64_t i, const Tensor& z) {
  const Tensor u = d.u.select(1, i), v = d.v.select(1, i);
  const Tensor zv = z.mv(v), ztu = z.mT().mv(u);
  const Tensor x = d.u.mT().mv(zv), y = d.v.mT().mv(ztu);
  const Tensor s_i = d.sigma[i];
  const Tensor gap = (s_i - d.sigma) * (s_i + d.sigma);
  const Tensor self = at::arange(d.sigma.size(0), gap.options().dtype(at::kLong)) == i;
  Tensor a = ((s_i * x + d.sigma * y) / gap).masked_fill_(self, 0.0);
  Tensor b = ((d.sigma * x + s_i * y) / gap).masked_fill_(self, 0.0);
  // Where U or V is square its complement is empty, and what rounding leaves of it must not be
  // divided by a small s_i.
  Tensor left = d.u.mv(a), right = d.v.mv(b);
  if (d.u.size(0) > d.u.size(1))
    left += (zv - d.u.mv(x)) / s_i;
  if (d.v.size(0) > d.v.size(1))
    right += (ztu - d.v.mv(y)) / s_i;
  return at::outer(left, v) + at::outer(u, right);
}

void check_simple(
    const char* op, const char* which, double grad, int64_t multiplicity, int64_t batch_index) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      multiplicity <= 1 || grad == 0.0, op, ": the second derivative of ", which,
      " does not exist at batch index ", batch_index, ", where it is repeated (multiplicity ",
      multiplicity, "); use the first derivative there, or a smaller cluster_rtol");
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
  const ScaledBatch scaled = scale_batch(op, "a", a);
  const Policy policy{rank_rtol, cluster_rtol, full_rank, std::min(scaled.n, scaled.p)};
  const auto options = scaled.matrices.options();
  const int64_t batch = scaled.batch;
  const Tensor z = cotangent.to(at::kDouble).reshape({batch, scaled.n, scaled.p});
  const Tensor g_max = grad_max.to(at::kDouble).reshape({batch}).contiguous();
  const Tensor g_min = grad_min.to(at::kDouble).reshape({batch}).contiguous();
  Tensor d_max = at::zeros({batch}, options), d_min = at::zeros({batch}, options);
  Tensor grad = at::zeros({batch, scaled.n, scaled.p}, options);
  for (int64_t b = 0; b < batch; ++b) {
    const Decomposition d = decompose_one(scaled.matrices[b], policy);
    const Clusters& found = d.clusters;
    const double scale = scaled.scale.const_data_ptr<double>()[b];
    const double weight_max = g_max.const_data_ptr<double>()[b];
    const double weight_min = g_min.const_data_ptr<double>()[b];
    check_simple(op, "sigma_max", weight_max, found.max_end, b);
    check_simple(op, "sigma_min", weight_min, found.min_end - found.min_begin, b);
    d_max[b] = (cluster_mean(d, 0, found.max_end, 1.0, false) * z[b]).sum();
    d_min[b] = (cluster_mean(d, found.min_begin, found.min_end, 1.0, false) * z[b]).sum();
    // u and v are of degree 0 in A: their derivative scales with the inverse of A's scale.
    if (weight_max != 0.0 && found.max_end == 1)
      grad[b].add_(simple_second_derivative(d, 0, z[b]), weight_max / scale);
    if (weight_min != 0.0 && found.min_end - found.min_begin == 1)
      grad[b].add_(simple_second_derivative(d, found.rank - 1, z[b]), weight_min / scale);
  }
  const auto shape = batch_shape(a);
  return {d_max.reshape(shape), d_min.reshape(shape), grad.reshape(a.sizes()).to(a.scalar_type())};
}

Tensor thin_gram_of(const Tensor& x) {
  return x.size(-2) <= x.size(-1) ? x.matmul(x.mT()) : x.mT().matmul(x);
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
  // grad_x = 2 g_max s_1 u_1 v_1^T + 2 g_min s_k u_k v_k^T + 4 g_F x x^T x, so with cotangent Z the
  // product rule adds 2 g <Z, u v^T> u v^T (from d s = u^T dx v) to the second derivative of s, and
  // the last term gives 4 g_F (Z x^T x + x Z^T x + x x^T Z).
  constexpr const char* op = "gram_extremes_double_backward";
  const ScaledBatch scaled = scale_batch(op, "x", x);
  const int64_t batch = scaled.batch, n = scaled.n, p = scaled.p;
  const Policy policy{rank_rtol, cluster_rtol, full_rank, p};
  const auto options = scaled.matrices.options();
  const Tensor z = cotangent.to(at::kDouble).reshape({batch, n, p});
  const Tensor g_max = grad_max.to(at::kDouble).reshape({batch}).contiguous();
  const Tensor g_min = grad_min.to(at::kDouble).reshape({batch}).contiguous();
  const Tensor g_f = grad_squared_frobenius.to(at::kDouble).reshape({batch}).contiguous();
  Tensor d_max = at::zeros({batch}, options), d_min = at::zeros({batch}, options);
  Tensor d_f = at::zeros({batch}, options);
  Tensor grad = at::zeros({batch, n, p}, options);
  for (int64_t b = 0; b < batch; ++b) {
    const Tensor xb = scaled.matrices[b], zb = z[b];
    const double scale = scaled.scale.const_data_ptr<double>()[b];
    const Decomposition d = decompose_one(xb, policy);
    const Clusters& found = d.clusters;
    const double weights[2] = {
        g_max.const_data_ptr<double>()[b], g_min.const_data_ptr<double>()[b]};
    const int64_t begins[2] = {0, found.min_begin}, ends[2] = {found.max_end, found.min_end};
    const int64_t index[2] = {0, found.rank - 1};
    const char* names[2] = {"lambda_max", "lambda_min"};
    Tensor* targets[2] = {&d_max, &d_min};
    for (int k = 0; k < 2; ++k) {
      check_simple(op, names[k], weights[k], ends[k] - begins[k], b);
      (*targets[k])[b] = (cluster_mean(d, begins[k], ends[k], 2.0 * scale, true) * zb).sum();
      if (weights[k] == 0.0 || ends[k] - begins[k] != 1)
        continue;
      const Tensor u = d.u.select(1, index[k]), v = d.v.select(1, index[k]);
      const Tensor along = u.dot(zb.mv(v));
      // 2 s (second derivative of s): s carries the scale that the derivative of u, v loses.
      grad[b].add_(
          simple_second_derivative(d, index[k], zb) * d.sigma[index[k]] + along * at::outer(u, v),
          2.0 * weights[k]);
    }
    const double weight = g_f.const_data_ptr<double>()[b];
    const Tensor thin = thin_gram_of(xb);
    const Tensor cubic = n <= p ? thin.mm(xb) : xb.mm(thin);  // x x^T x
    d_f[b] = 4.0 * scale * scale * scale * (zb * cubic).sum();
    // x Z^T x with the thin side in the middle.
    const Tensor mixed = n <= p ? xb.mm(zb.mT()).mm(xb) : xb.mm(zb.mT().mm(xb));
    const Tensor outer_terms =
        n <= p ? zb.mm(xb.mT()).mm(xb) + thin.mm(zb) : zb.mm(thin) + xb.mm(xb.mT().mm(zb));
    grad[b].add_(mixed + outer_terms, 4.0 * weight * scale * scale);
  }
  const auto shape = batch_shape(x);
  return {
      d_max.reshape(shape), d_min.reshape(shape), d_f.reshape(shape),
      grad.reshape(x.sizes()).to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("extremal_singular_values_double_backward", &extremal_singular_values_double_backward);
  m.impl("gram_extremes_double_backward", &gram_extremes_double_backward);
}

}  // namespace immunize_ext
