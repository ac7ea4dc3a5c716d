// Extremal singular values on the CPU: forward, backward and double backward.
//
// d sigma_i = u_i^T dA v_i for a simple singular value, so grad_A = g u_i v_i^T. At an extreme of
// multiplicity m any u_i v_i^T of the cluster is a subgradient, and which one depends on the basis
// that a solver happened to return; their mean does not, and is the element of least norm of the
// Clarke subdifferential. The forward keeps one pair (u, v) an extreme, which is all a simple
// extreme needs; the backward decomposes again only the matrices whose extreme is a cluster.
//
// K = x^T x: lambda_i = sigma_i(x)^2, d lambda_i = 2 sigma_i u_i^T dx v_i, and
// |K|_F^2 = |x x^T|_F^2 with d|K|_F^2/dx = 4 x K = 4 (x x^T) x.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"

namespace immunize_ext {
namespace {

using at::Tensor;

struct Policy {
  double rank_rtol;
  double cluster_rtol;
  bool full_rank;
};

// Index ranges [begin, end) into descending singular values; empty where the gradient is zero.
struct Clusters {
  int64_t rank = 0;
  int64_t max_end = 0;
  int64_t min_begin = 0;
  int64_t min_end = 0;
};

// full_side: how many singular values the policy full_rank speaks of (p for a p x p Gram matrix).
Clusters find_clusters(const double* sigma, int64_t side, int64_t full_side, Policy policy) {
  Clusters found;
  const double top = sigma[0];
  // Strictly greater: the zero matrix has rank 0 although 0 >= rtol * 0.
  while (found.rank < side && sigma[found.rank] > policy.rank_rtol * top)
    ++found.rank;
  if (found.rank == 0)
    return found;
  const double near = policy.cluster_rtol * top;
  while (found.max_end < found.rank && top - sigma[found.max_end] <= near)
    ++found.max_end;
  if (policy.full_rank && found.rank < full_side)
    return found;
  found.min_begin = found.min_end = found.rank;
  const double last = sigma[found.rank - 1];
  while (found.min_begin > 0 && sigma[found.min_begin - 1] - last <= near)
    --found.min_begin;
  return found;
}

// Power of two that brings the largest entry near 1: scaling by it is exact.
double power_of_two_scale(double largest) {
  if (largest == 0.0)
    return 1.0;
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent);
}

// A batch of matrices in float64, contiguous, each divided by its own power of two.
struct ScaledBatch {
  Tensor matrices;  // [batch, n, p] float64
  Tensor scale;     // [batch] float64
  int64_t batch, n, p;
};

ScaledBatch scale_batch(const char* op, const char* name, const Tensor& a) {
  check_real_floating(op, name, a);
  TORCH_CHECK_VALUE(
      a.dim() >= 2 && a.size(-2) > 0 && a.size(-1) > 0, op, ": ", name,
      " must have shape [*, n, p] with n >= 1 and p >= 1, got ", a.sizes());
  const int64_t n = a.size(-2), p = a.size(-1);
  ScaledBatch scaled;
  scaled.n = n;
  scaled.p = p;
  scaled.batch = a.numel() / (n * p);
  const Tensor flat = a.to(at::kDouble).reshape({scaled.batch, n, p});
  scaled.scale = at::ones({scaled.batch}, flat.options());
  if (scaled.batch == 0) {
    scaled.matrices = flat;
    return scaled;
  }
  // amax propagates NaN, so one pass finds the scale and non-finite entries alike.
  const Tensor largest = flat.abs().amax({1, 2});
  const double* largest_data = largest.const_data_ptr<double>();
  double* scale_data = scaled.scale.mutable_data_ptr<double>();
  for (int64_t b = 0; b < scaled.batch; ++b) {
    TORCH_CHECK_VALUE(
        std::isfinite(largest_data[b]), op, ": ", name,
        " must be finite, got NaN or infinity at batch index ", b,
        "; look for an overflow upstream, float16 features for instance");
    scale_data[b] = power_of_two_scale(largest_data[b]);
  }
  scaled.matrices = (flat / scaled.scale.view({-1, 1, 1})).contiguous();
  return scaled;
}

at::IntArrayRef batch_shape(const Tensor& a) {
  return a.sizes().slice(0, a.dim() - 2);
}

std::vector<int64_t> with_side(at::IntArrayRef batch, int64_t side) {
  std::vector<int64_t> shape(batch.begin(), batch.end());
  shape.push_back(side);
  return shape;
}

// What both forward operators return for one extreme each of a batch, in scaled units.
struct ExtremesBatch {
  Tensor largest, smallest, rank, multiplicity_max, multiplicity_min, u_max, v_max, u_min, v_min;
};

ExtremesBatch decompose(const ScaledBatch& scaled, int64_t full_side, Policy policy) {
  const auto options = scaled.matrices.options();
  const int64_t batch = scaled.batch, side = std::min(scaled.n, scaled.p);
  ExtremesBatch out;
  out.largest = at::zeros({batch}, options);
  out.smallest = at::zeros({batch}, options);
  out.rank = at::zeros({batch}, options.dtype(at::kLong));
  out.multiplicity_max = at::zeros({batch}, options.dtype(at::kLong));
  out.multiplicity_min = at::zeros({batch}, options.dtype(at::kLong));
  out.u_max = at::zeros({batch, scaled.n}, options);
  out.v_max = at::zeros({batch, scaled.p}, options);
  out.u_min = at::zeros({batch, scaled.n}, options);
  out.v_min = at::zeros({batch, scaled.p}, options);
  if (batch == 0)
    return out;
  const auto [u, sigma_any, vh] = at::linalg_svd(scaled.matrices, /*full_matrices=*/false);
  const Tensor sigma = sigma_any.contiguous();
  for (int64_t b = 0; b < batch; ++b) {
    const double* s = sigma.const_data_ptr<double>() + b * side;
    const Clusters found = find_clusters(s, side, full_side, policy);
    const bool has_min = found.min_end > found.min_begin;
    out.largest.mutable_data_ptr<double>()[b] = s[0];
    out.smallest.mutable_data_ptr<double>()[b] = has_min ? s[found.rank - 1] : 0.0;
    out.rank.mutable_data_ptr<int64_t>()[b] = found.rank;
    out.multiplicity_max.mutable_data_ptr<int64_t>()[b] =
        found.rank > 0 ? found.max_end : full_side;
    out.multiplicity_min.mutable_data_ptr<int64_t>()[b] =
        has_min ? found.min_end - found.min_begin : full_side - found.rank;
    if (found.rank > 0) {
      out.u_max[b].copy_(u[b].select(1, 0));
      out.v_max[b].copy_(vh[b].select(0, 0));
    }
    if (has_min) {
      out.u_min[b].copy_(u[b].select(1, found.rank - 1));
      out.v_min[b].copy_(vh[b].select(0, found.rank - 1));
    }
  }
  return out;
}

// One matrix decomposed again in the backward pass.
struct Decomposition {
  Tensor u, sigma, v;  // [n, t], [t], [p, t]
  Clusters clusters;
};

Decomposition decompose_one(const Tensor& scaled, int64_t full_side, Policy policy) {
  Decomposition d;
  auto [u, sigma, vh] = at::linalg_svd(scaled, /*full_matrices=*/false);
  d.u = u;
  d.sigma = sigma.contiguous();
  d.v = vh.mH();
  d.clusters = find_clusters(d.sigma.const_data_ptr<double>(), d.sigma.size(0), full_side, policy);
  return d;
}

// weight * mean over [begin, end) of f(sigma_i) u_i v_i^T, with f = 1 or f = sigma.
Tensor cluster_mean(
    const Decomposition& d, int64_t begin, int64_t end, double weight, bool times_sigma) {
  if (end <= begin)
    return at::zeros({d.u.size(0), d.v.size(0)}, d.u.options());
  Tensor left = d.u.slice(1, begin, end);
  if (times_sigma)
    left = left * d.sigma.slice(0, begin, end);
  return left.mm(d.v.slice(1, begin, end).mT()).mul_(weight / static_cast<double>(end - begin));
}

// grad += g_max mean(u v^T)_max + g_min mean(u v^T)_min for each matrix (times 2 sigma for K).
// Returns float64 [batch, n, p].
Tensor rank_one_gradient(
    const Tensor& grad_max,
    const Tensor& grad_min,
    const Tensor& sigma_max,
    const Tensor& sigma_min,
    bool of_gram,
    const Tensor& a,
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min,
    Policy policy) {
  const int64_t n = a.size(-2), p = a.size(-1), batch = a.numel() / (n * p);
  const auto options = a.options().dtype(at::kDouble);
  Tensor grad = at::empty({batch, n, p}, options);
  const Tensor g_max = grad_max.to(at::kDouble).reshape({batch}).contiguous();
  const Tensor g_min = grad_min.to(at::kDouble).reshape({batch}).contiguous();
  const Tensor m_max = multiplicity_max.reshape({batch}).contiguous();
  const Tensor m_min = multiplicity_min.reshape({batch}).contiguous();
  const Tensor um = u_max.reshape({batch, n}), vm = v_max.reshape({batch, p});
  const Tensor un = u_min.reshape({batch, n}), vn = v_min.reshape({batch, p});
  const int64_t full_side = of_gram ? p : std::min(n, p);
  for (int64_t b = 0; b < batch; ++b) {
    double weight_max = g_max.const_data_ptr<double>()[b];
    double weight_min = g_min.const_data_ptr<double>()[b];
    const bool cluster = (m_max.const_data_ptr<int64_t>()[b] > 1 && weight_max != 0.0) ||
                         (m_min.const_data_ptr<int64_t>()[b] > 1 && weight_min != 0.0);
    if (!cluster) {
      if (of_gram) {
        weight_max *= 2.0 * sigma_max.const_data_ptr<double>()[b];
        weight_min *= 2.0 * sigma_min.const_data_ptr<double>()[b];
      }
      Tensor grad_b = grad[b];
      at::outer_out(grad_b, um[b] * weight_max, vm[b]);
      grad_b.addr_(un[b], vn[b], 1.0, weight_min);
      continue;
    }
    const Tensor matrix = a.reshape({batch, n, p})[b].to(at::kDouble);
    const double scale = power_of_two_scale(matrix.abs().max().item<double>());
    const Decomposition d = decompose_one(matrix / scale, full_side, policy);
    const double factor = of_gram ? 2.0 * scale : 1.0;
    const Clusters& found = d.clusters;
    grad[b] = cluster_mean(d, 0, found.max_end, weight_max * factor, of_gram) +
              cluster_mean(d, found.min_begin, found.min_end, weight_min * factor, of_gram);
  }
  return grad;
}

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
  const Tensor left = d.u.mv(a) + (zv - d.u.mv(x)) / s_i;
  const Tensor right = d.v.mv(b) + (ztu - d.v.mv(y)) / s_i;
  return at::outer(left, v) + at::outer(u, right);
}

void check_simple(
    const char* op, const char* which, double grad, int64_t multiplicity, int64_t batch_index) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      multiplicity <= 1 || grad == 0.0, op, ": the second derivative of ", which,
      " does not exist at batch index ", batch_index, ", where it is repeated (multiplicity ",
      multiplicity, "); use the first derivative there, or a smaller cluster_rtol");
}

Tensor like_batch(const Tensor& flat, at::IntArrayRef batch) {
  return flat.reshape(batch);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward extremal_singular_values(
    const Tensor& a,  // [*, n, p]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const ScaledBatch scaled = scale_batch("extremal_singular_values", "a", a);
  const auto shape = batch_shape(a);
  const ExtremesBatch e =
      decompose(scaled, std::min(scaled.n, scaled.p), {rank_rtol, cluster_rtol, full_rank});
  return {
      like_batch(e.largest * scaled.scale, shape),
      like_batch(e.smallest * scaled.scale, shape),
      like_batch(e.rank, shape),
      like_batch(e.multiplicity_max, shape),
      like_batch(e.multiplicity_min, shape),
      e.u_max.reshape(with_side(shape, scaled.n)),
      e.v_max.reshape(with_side(shape, scaled.p)),
      e.u_min.reshape(with_side(shape, scaled.n)),
      e.v_min.reshape(with_side(shape, scaled.p))};
}

Tensor extremal_singular_values_backward(
    const Tensor& grad_max,  // [*] float64
    const Tensor& grad_min,  // [*] float64
    const Tensor& a,         // [*, n, p]
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const Tensor unused;
  return rank_one_gradient(
             grad_max, grad_min, unused, unused, /*of_gram=*/false, a, multiplicity_max,
             multiplicity_min, u_max, v_max, u_min, v_min, {rank_rtol, cluster_rtol, full_rank})
      .reshape(a.sizes())
      .to(a.scalar_type());
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
  const Policy policy{rank_rtol, cluster_rtol, full_rank};
  const auto options = scaled.matrices.options();
  const int64_t batch = scaled.batch;
  const Tensor z = cotangent.to(at::kDouble).reshape({batch, scaled.n, scaled.p});
  const Tensor g_max = grad_max.to(at::kDouble).reshape({batch}).contiguous();
  const Tensor g_min = grad_min.to(at::kDouble).reshape({batch}).contiguous();
  Tensor d_max = at::zeros({batch}, options), d_min = at::zeros({batch}, options);
  Tensor grad = at::zeros({batch, scaled.n, scaled.p}, options);
  for (int64_t b = 0; b < batch; ++b) {
    const Decomposition d = decompose_one(scaled.matrices[b], std::min(scaled.n, scaled.p), policy);
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
  return {
      like_batch(d_max, shape), like_batch(d_min, shape),
      grad.reshape(a.sizes()).to(a.scalar_type())};
}

Tensor thin_gram_of(const Tensor& x) {
  return x.size(-2) <= x.size(-1) ? x.matmul(x.mT()) : x.mT().matmul(x);
}

using GramForward = std::
    tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

GramForward gram_extremes(
    const Tensor& x,  // [*, n, p]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const ScaledBatch scaled = scale_batch("gram_extremes", "x", x);
  const int64_t n = scaled.n, p = scaled.p;
  const auto shape = batch_shape(x);
  const ExtremesBatch e = decompose(scaled, p, {rank_rtol, cluster_rtol, full_rank});
  const Tensor thin = thin_gram_of(scaled.matrices).contiguous();
  const Tensor squared_scale = scaled.scale.square();
  auto thin_shape = with_side(with_side(shape, std::min(n, p)), std::min(n, p));
  return {
      like_batch(e.largest.square() * squared_scale, shape),
      like_batch(e.smallest.square() * squared_scale, shape),
      like_batch(thin.square().sum({1, 2}) * squared_scale.square(), shape),
      like_batch(e.rank, shape),
      like_batch(e.multiplicity_max, shape),
      like_batch(e.multiplicity_min, shape),
      e.u_max.reshape(with_side(shape, n)),
      e.v_max.reshape(with_side(shape, p)),
      e.u_min.reshape(with_side(shape, n)),
      e.v_min.reshape(with_side(shape, p)),
      (thin * squared_scale.view({-1, 1, 1})).reshape(thin_shape)};
}

Tensor gram_extremes_backward(
    const Tensor& grad_max,
    const Tensor& grad_min,
    const Tensor& grad_squared_frobenius,
    const Tensor& x,  // [*, n, p]
    const Tensor& lambda_max,
    const Tensor& lambda_min,
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min,
    const Tensor& thin_gram,  // [*, t, t]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const int64_t n = x.size(-2), p = x.size(-1), side = std::min(n, p);
  const int64_t batch = x.numel() / (n * p);
  const Tensor sigma_max = lambda_max.sqrt().reshape({batch}).contiguous();
  const Tensor sigma_min = lambda_min.sqrt().reshape({batch}).contiguous();
  Tensor grad = rank_one_gradient(
      grad_max, grad_min, sigma_max, sigma_min, /*of_gram=*/true, x, multiplicity_max,
      multiplicity_min, u_max, v_max, u_min, v_min, {rank_rtol, cluster_rtol, full_rank});
  const Tensor weighted = thin_gram.reshape({batch, side, side}) *
                          (4.0 * grad_squared_frobenius.to(at::kDouble)).reshape({batch, 1, 1});
  const Tensor flat = x.to(at::kDouble).reshape({batch, n, p});
  grad = n <= p ? grad.baddbmm_(weighted, flat) : grad.baddbmm_(flat, weighted);
  return grad.reshape(x.sizes()).to(x.scalar_type());
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
  const Policy policy{rank_rtol, cluster_rtol, full_rank};
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
    const Decomposition d = decompose_one(xb, p, policy);
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
      like_batch(d_max, shape), like_batch(d_min, shape), like_batch(d_f, shape),
      grad.reshape(x.sizes()).to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("extremal_singular_values", &extremal_singular_values);
  m.impl("extremal_singular_values_backward", &extremal_singular_values_backward);
  m.impl("extremal_singular_values_double_backward", &extremal_singular_values_double_backward);
  m.impl("gram_extremes", &gram_extremes);
  m.impl("gram_extremes_backward", &gram_extremes_backward);
  m.impl("gram_extremes_double_backward", &gram_extremes_double_backward);
}

}  // namespace immunize_ext
