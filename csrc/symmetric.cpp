// Algebraic extremes of symmetric matrices: forward and backward on every device, and a composition
// of ATen operators over the whole batch for those without an engine of ours.
//
// d lambda_i = v_i^T dH v_i for a simple eigenvalue, so grad_H = g v_i v_i^T, symmetric as H is. At
// an extreme of multiplicity m the gradient is the mean of v_i v_i^T over the cluster, the element
// of least norm of the subdifferential; the backward decomposes such a matrix again.
//
// The composition. Both extremes, their multiplicities and their vectors follow from one
// eigendecomposition of the library; an indefinite matrix has no Cholesky factor or Gram matrix that
// a kernel of ours could start from. On an H100 it takes 28 ms at a side of 2048, where block Krylov
// spaces with a proof took 84. torch waits for the solvers' verdicts, so these operators wait as well
// (the backward pass for one number more: which matrices have a cluster) and refuse to be captured
// into a CUDA graph.

#include "symmetric.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "capture.h"
#include "checks.h"
#include "spectrum.h"
#include "tensors.h"

namespace immunize_ext {

int64_t check_square(const char* op, const Tensor& h) {
  check_floating_matrix(op, "h", h);
  IMMUNIZE_CHECK(h.size(-1) == h.size(-2), op, "h", "have shape [*, p, p]", h.sizes());
  return h.size(-1);
}

double allowed_asymmetry(const Tensor& h) {
  const double eps = h.scalar_type() == at::kDouble  ? 0x1p-52
                     : h.scalar_type() == at::kFloat ? 0x1p-23
                     : h.scalar_type() == at::kHalf  ? 0x1p-10
                                                     : 0x1p-7;
  return 8.0 * std::sqrt(static_cast<double>(h.size(-1))) * eps;
}

void refuse_infinite(const char* op, int64_t batch_index) {
  TORCH_CHECK_VALUE(
      false, op, ": h must be finite, got NaN or infinity at batch index ", batch_index,
      "; look for an overflow upstream, float16 features for instance");
}

void refuse_asymmetric(const char* op, double difference, int64_t batch_index) {
  TORCH_CHECK_VALUE(
      false, op, ": h must be symmetric, got entries that differ by ", difference,
      " from their mirror image at batch index ", batch_index,
      "; pass (h + h.mT) / 2 if the difference has no meaning");
}

namespace {

void refuse_capture(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_capturing(), op,
      ": cannot be captured into a CUDA graph, since the eigensolver reports to the host; call it "
      "outside, or take extremal_singular_values for a definite matrix");
}

// h / scale, exactly symmetric, in float64.
struct Scaled {
  Tensor h;      // [batch, p, p]
  Tensor scale;  // [batch, 1, 1], a power of two
};

Scaled scaled(const Tensor& h) {
  const Tensor wide = h.to(at::kDouble);
  const Tensor scale = power_of_two_scale(wide.abs().amax({1, 2}, /*keepdim=*/true));
  const Tensor first = wide / scale;
  return {first * 0.5 + first.mT() * 0.5, scale};
}

// Eigenvalues ascending, vectors as columns, and which of them belong to each extreme.
struct Eigenpairs {
  Tensor lambda, v;    // [batch, p], [batch, p, p]
  Tensor most, least;  // [batch, p], bool
};

Eigenpairs eigenpairs(const Tensor& h, double cluster_rtol) {
  Eigenpairs d;
  std::tie(d.lambda, d.v) = at::linalg_eigh(h);
  const int64_t p = h.size(-1);
  const Tensor bottom = d.lambda.narrow(1, 0, 1), top = d.lambda.narrow(1, p - 1, 1);
  const Tensor near = at::maximum(bottom.abs(), top.abs()) * cluster_rtol;
  d.most = (top - d.lambda) <= near;
  d.least = (d.lambda - bottom) <= near;
  return d;
}

}  // namespace

SymmetricBatch decomposed_extremes(const Tensor& h, double cluster_rtol) {
  const OneThread one;
  const Eigenpairs d = eigenpairs(h, cluster_rtol);
  const int64_t p = h.size(-1);
  return {d.lambda.select(1, p - 1), d.lambda.select(1, 0), d.most.sum(1), d.least.sum(1),
          d.v.select(2, p - 1),      d.v.select(2, 0)};
}

Tensor cluster_gradient(
    const Tensor& h, const Tensor& grad_max, const Tensor& grad_min, double cluster_rtol) {
  const OneThread one;
  const Eigenpairs d = eigenpairs(scaled(h).h, cluster_rtol);
  const auto mean = [](const Tensor& members, const Tensor& g) {
    const Tensor each = members.to(at::kDouble);
    return each * (g.unsqueeze(1) / each.sum(1, /*keepdim=*/true));
  };
  const Tensor weight = mean(d.most, grad_max) + mean(d.least, grad_min);
  const Tensor sum = at::bmm(d.v * weight.unsqueeze(1), d.v.mT());
  return (sum + sum.mT()) * 0.5;  // a product need not be symmetric
}

namespace {

SymmetricBatch composed_extremes(
    const char* op, const Tensor& h, double allowed, double cluster_rtol) {
  refuse_capture(op);
  if (h.numel() == 0) {
    const auto numbers = h.options().dtype(at::kDouble);
    const Tensor values = at::empty({0}, numbers),
                 counts = at::empty({0}, numbers.dtype(at::kLong));
    const Tensor vectors = at::empty({0, h.size(-1)}, numbers);
    return {values, values.clone(), counts, counts.clone(), vectors, vectors.clone()};
  }
  // One wait, and far from the ends of the range nothing to scale: a launch costs more than a pass.
  const Tensor wide = h.to(at::kDouble);
  const auto largest = [](const Tensor& x) {
    return at::linalg_vector_norm(x, std::numeric_limits<double>::infinity(), {1, 2});
  };
  const Tensor numbers = at::stack({largest(wide), largest(wide - wide.mT())}).cpu();
  bool plain = true;
  for (int64_t b = 0; b < h.size(0); ++b) {
    const double entry = numbers.const_data_ptr<double>()[b];
    const double difference = numbers.const_data_ptr<double>()[h.size(0) + b];
    if (!std::isfinite(entry))
      refuse_infinite(op, b);
    if (!(difference <= allowed * entry))
      refuse_asymmetric(op, difference, b);
    plain = plain && std::abs(std::ilogb(power_of_two_scale(entry))) <= 100;
  }
  const Scaled s = plain ? Scaled{(wide + wide.mT()).mul_(0.5), Tensor()} : scaled(h);
  SymmetricBatch x = decomposed_extremes(s.h, cluster_rtol);
  const auto value = [&s](const Tensor& lambda) {
    return s.scale.defined() ? lambda * s.scale.view({-1}) : lambda.clone();
  };
  x.lambda_max = value(x.lambda_max);
  x.lambda_min = value(x.lambda_min);
  // Copies: of a side of 1 both are the same number, and results must not share memory.
  x.v_max = x.v_max.clone(at::MemoryFormat::Contiguous);
  x.v_min = x.v_min.clone(at::MemoryFormat::Contiguous);
  return x;
}

Tensor composed_gradient(
    const char* op, const Tensor& h, const SymmetricGradient& in, double cluster_rtol) {
  const auto weighted = [](const Tensor& v, const Tensor& weight) {
    return (v * weight.unsqueeze(1)).unsqueeze(2);
  };
  Tensor grad = weighted(in.v_max, in.grad_max) * in.v_max.unsqueeze(1);
  grad.addcmul_(weighted(in.v_min, in.grad_min), in.v_min.unsqueeze(1));
  if (grad.numel() == 0)
    return grad;
  refuse_capture(op);
  if (!(at::maximum(in.multiplicity_max, in.multiplicity_min) > 1).any().item<bool>())
    return grad;
  const Tensor repeated = (in.multiplicity_max > 1)
                              .logical_and(in.grad_max != 0)
                              .logical_or((in.multiplicity_min > 1).logical_and(in.grad_min != 0));
  const Tensor index = repeated.nonzero().view({-1});
  const auto some = [&index](const Tensor& t) { return t.index_select(0, index); };
  if (index.numel() > 0)
    grad.index_copy_(
        0, index, cluster_gradient(some(h), some(in.grad_max), some(in.grad_min), cluster_rtol));
  return grad;
}

constexpr SymmetricEngine composition{&composed_extremes, &composed_gradient};

// --- the operators --------------------------------------------------------------------------------

Tensor flattened(const Tensor& h) {
  const int64_t p = h.size(-1);
  return readable(h).view({h.numel() / (p * p), p, p});
}

template <const SymmetricEngine& engine>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> symmetric_extremes(
    const Tensor& h,  // [*, p, p]
    double cluster_rtol) {
  constexpr const char* op = "symmetric_extremes";
  const int64_t p = check_square(op, h);
  const c10::OptionalDeviceGuard guard(h.device());
  const SymmetricBatch x = engine.extremes(op, flattened(h), allowed_asymmetry(h), cluster_rtol);
  const auto shape = batch_shape(h);
  return {
      shaped(x.lambda_max, shape),
      shaped(x.lambda_min, shape),
      shaped(x.multiplicity_max, shape),
      shaped(x.multiplicity_min, shape),
      shaped(x.v_max, with_sides(shape, {p})),
      shaped(x.v_min, with_sides(shape, {p}))};
}

template <const SymmetricEngine& engine>
Tensor symmetric_extremes_backward(
    const Tensor& grad_max,  // [*] float64
    const Tensor& grad_min,  // [*] float64
    const Tensor& h,         // [*, p, p]
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& v_max,  // [*, p]
    const Tensor& v_min,
    double cluster_rtol) {
  constexpr const char* op = "symmetric_extremes_backward";
  const int64_t p = check_square(op, h);
  const c10::OptionalDeviceGuard guard(h.device());
  const SymmetricGradient in{
      incoming_gradient(op, "grad_max", grad_max, h),
      incoming_gradient(op, "grad_min", grad_min, h),
      saved_counts(op, "multiplicity_max", multiplicity_max, h),
      saved_counts(op, "multiplicity_min", multiplicity_min, h),
      saved_numbers(op, "v_max", v_max, h, {p}),
      saved_numbers(op, "v_min", v_min, h, {p})};
  return engine.gradient(op, flattened(h), in, cluster_rtol).view(h.sizes()).to(h.scalar_type());
}

template <const SymmetricEngine& engine>
void register_operators(torch::Library& m) {
  m.impl("symmetric_extremes", &symmetric_extremes<engine>);
  m.impl("symmetric_extremes_backward", &symmetric_extremes_backward<engine>);
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  register_operators<cpu_symmetric>(m);
}

// In every build: nothing here was compiled for a device, and so it is tested without one.
TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  register_operators<composition>(m);
}

}  // namespace immunize_ext
