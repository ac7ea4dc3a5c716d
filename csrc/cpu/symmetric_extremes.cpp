// Algebraic extremes of symmetric matrices on the CPU: forward and backward.
//
// d lambda_i = v_i^T dH v_i for a simple eigenvalue, so grad_H = g v_i v_i^T, symmetric as H is. At
// an extreme of multiplicity m the gradient is the mean of v_i v_i^T over the cluster, the element
// of least norm of the subdifferential; the backward decomposes such a matrix again.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "spectrum_common.h"
#include "spectrum_kernels.h"
#include "symmetric_input.h"

namespace immunize_ext {
namespace {

using namespace spectrum;

// Eigenvalues ascending and vectors, and how many of them form each extreme.
struct Decomposed {
  Tensor lambda, v;  // [t], [t, t]
  int64_t most = 1, least = 1;
};

Decomposed eigen(const Tensor& h, double cluster_rtol) {
  Decomposed d;
  const Tensor wide = h.to(at::kDouble);
  const double scale = power_of_two_scale(wide.abs().max().item<double>());
  auto [lambda, v] = at::linalg_eigh((wide / scale + wide.mT() / scale) * 0.5);
  d.lambda = (lambda * scale).contiguous();
  d.v = v;
  const double* x = d.lambda.const_data_ptr<double>();
  const int64_t t = d.lambda.size(0);
  const double near = cluster_rtol * std::max(std::abs(x[0]), std::abs(x[t - 1]));
  while (d.most < t && x[t - 1] - x[t - 1 - d.most] <= near)
    ++d.most;
  while (d.least < t && x[d.least] - x[0] <= near)
    ++d.least;
  return d;
}

Tensor mean_projector(const Tensor& v, int64_t begin, int64_t count) {
  const Tensor part = v.slice(1, begin, begin + count);
  const Tensor sum = part.mm(part.mT());
  return (sum + sum.mT())
      .div_(2.0 * static_cast<double>(count));  // a product need not be symmetric
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> symmetric_extremes(
    const Tensor& h,  // [*, p, p]
    double cluster_rtol) {
  constexpr const char* op = "symmetric_extremes";
  const int64_t t = check_square(op, h), batch = h.numel() / (t * t);
  const Tensor flat = readable(h).view({batch, t, t});
  const auto options = flat.options().dtype(at::kDouble);
  const Tensor largest = at::empty({batch}, options), smallest = at::empty({batch}, options);
  const Tensor m_max = at::empty({batch}, options.dtype(at::kLong));
  const Tensor m_min = at::empty({batch}, options.dtype(at::kLong));
  const Tensor v_max = at::zeros({batch, t}, options), v_min = at::zeros({batch, t}, options);
  std::vector<Loaded> loaded(batch);
  std::vector<SymmetricPair> pairs(batch);
  std::vector<char> settled(batch, 0);
  for_each_matrix(batch, [&](int64_t b) {
    const int64_t ld = padded(t);
    std::vector<double> g(ld * ld);
    loaded[b] = flat.scalar_type() == at::kDouble
                    ? load_symmetric(flat.const_data_ptr<double>() + b * t * t, t, ld, g.data())
                    : load_symmetric(flat.const_data_ptr<float>() + b * t * t, t, ld, g.data());
    if (!loaded[b].finite)
      return;
    SymmetricPair& pair = pairs[b];
    pair.v_max = v_max.mutable_data_ptr<double>() + b * t;
    pair.v_min = v_min.mutable_data_ptr<double>() + b * t;
    if (loaded[b].largest == 0.0) {
      // The zero matrix: one cluster, whose mean gradient is I / p.
      pair.multiplicity_max = pair.multiplicity_min = t;
      pair.v_max[t - 1] = pair.v_min[0] = 1.0;
      settled[b] = 1;
      return;
    }
    settled[b] = t >= kKrylovSide && IMMUNIZE_EXT_SPECTRUM(large_symmetric_extremes(
                                         g.data(), t, cluster_rtol, Threads{}, pair));
    if (settled[b])
      return;
    Workspace work(t, t);
    settled[b] =
        IMMUNIZE_EXT_SPECTRUM(symmetric_extremes(g.data(), t, cluster_rtol, work, Threads{}, pair));
  });
  for (int64_t b = 0; b < batch; ++b) {
    check_loaded(op, h, loaded[b], b);
    SymmetricPair& pair = pairs[b];
    if (!settled[b]) {
      const Decomposed d = eigen(flat[b], cluster_rtol);
      pair.lambda_max = d.lambda[t - 1].item<double>() / loaded[b].scale;
      pair.lambda_min = d.lambda[0].item<double>() / loaded[b].scale;
      pair.multiplicity_max = d.most;
      pair.multiplicity_min = d.least;
      v_max[b].copy_(d.v.select(1, t - 1));
      v_min[b].copy_(d.v.select(1, 0));
    }
    largest.mutable_data_ptr<double>()[b] = pair.lambda_max * loaded[b].scale;
    smallest.mutable_data_ptr<double>()[b] = pair.lambda_min * loaded[b].scale;
    m_max.mutable_data_ptr<int64_t>()[b] = pair.multiplicity_max;
    m_min.mutable_data_ptr<int64_t>()[b] = pair.multiplicity_min;
  }
  const auto shape = batch_shape(h);
  return {
      largest.view(shape),
      smallest.view(shape),
      m_max.view(shape),
      m_min.view(shape),
      v_max.view(with_side(shape, t)),
      v_min.view(with_side(shape, t))};
}

// out = first x x^T + second y y^T.
template <typename T>
void rank_two(int64_t t, double first, const double* x, double second, const double* y, T* out) {
  at::parallel_for(0, t, std::max<int64_t>(1, 50000 / t), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double a = first * x[i], b = second * y[i];
      for (int64_t j = 0; j < t; ++j)
        out[i * t + j] = static_cast<T>(a * x[j] + b * y[j]);
    }
  });
}

Tensor symmetric_extremes_backward(
    const Tensor& grad_max,  // [*] float64
    const Tensor& grad_min,  // [*] float64
    const Tensor& h,         // [*, p, p]
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& v_max,
    const Tensor& v_min,
    double cluster_rtol) {
  const int64_t t = h.size(-1), batch = h.numel() / (t * t);
  const Tensor flat = readable(h).view({batch, t, t});
  const Tensor grad = at::empty({batch, t, t}, flat.options());
  const Tensor g_max = grad_max.to(at::kDouble).reshape({batch}).contiguous();
  const Tensor g_min = grad_min.to(at::kDouble).reshape({batch}).contiguous();
  const Tensor m_max = multiplicity_max.reshape({batch}).contiguous();
  const Tensor m_min = multiplicity_min.reshape({batch}).contiguous();
  const Tensor x = v_max.reshape({batch, t}).contiguous();
  const Tensor y = v_min.reshape({batch, t}).contiguous();
  for (int64_t b = 0; b < batch; ++b) {
    const double first = g_max.const_data_ptr<double>()[b];
    const double second = g_min.const_data_ptr<double>()[b];
    if ((first != 0.0 && m_max.const_data_ptr<int64_t>()[b] > 1) ||
        (second != 0.0 && m_min.const_data_ptr<int64_t>()[b] > 1)) {
      const Decomposed d = eigen(flat[b], cluster_rtol);
      grad[b].copy_(
          mean_projector(d.v, t - d.most, d.most) * first +
          mean_projector(d.v, 0, d.least) * second);
      continue;
    }
    const double* xb = x.const_data_ptr<double>() + b * t;
    const double* yb = y.const_data_ptr<double>() + b * t;
    if (flat.scalar_type() == at::kDouble)
      rank_two(t, first, xb, second, yb, grad.mutable_data_ptr<double>() + b * t * t);
    else
      rank_two(t, first, xb, second, yb, grad.mutable_data_ptr<float>() + b * t * t);
  }
  return grad.view(h.sizes()).to(h.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("symmetric_extremes", &symmetric_extremes);
  m.impl("symmetric_extremes_backward", &symmetric_extremes_backward);
}

}  // namespace immunize_ext
