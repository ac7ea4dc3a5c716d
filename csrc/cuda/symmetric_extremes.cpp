// Algebraic extremes of symmetric matrices on CUDA: a composition of ATen operators over the whole
// batch, forward and backward. Derivations: cpu/symmetric_extremes.cpp.
//
// Up to a side of 1024 the eigendecomposition is cuSOLVER's, batched for small sides: both
// extremes, their multiplicities and their vectors follow from one call, and an indefinite matrix
// has no Cholesky factor or Gram matrix that a kernel of ours could start from. Beyond, Krylov
// spaces with a proof (krylov.h) find the extremes alone; the side was chosen as on the
// CPU, and has not been measured on hardware. torch waits for the solvers' verdicts, so these
// operators wait as well (the backward pass for one number more: which matrices have a cluster) and
// refuse to be captured into a CUDA graph.

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "krylov.h"
#include "power_of_two.h"

namespace immunize_ext {
namespace {

using at::Tensor;

// h / scale, exactly symmetric, in float64.
struct Scaled {
  Tensor h;      // [batch, p, p]
  Tensor scale;  // [batch, 1, 1], a power of two
};

void refuse_capture(const char* op, const Tensor& h) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !h.is_cuda() ||
          c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
      op,
      ": cannot be captured into a CUDA graph, since the eigensolver reports to the host; call it "
      "outside, or take extremal_singular_values for a definite matrix");
}

double epsilon_of(at::ScalarType dtype) {
  return dtype == at::kDouble  ? 0x1p-52
         : dtype == at::kFloat ? 0x1p-23
         : dtype == at::kHalf  ? 0x1p-10
                               : 0x1p-7;
}

Scaled scaled_symmetric(const char* op, const Tensor& h, bool check) {
  check_floating_matrix(op, "h", h);
  refuse_capture(op, h);
  const int64_t p = h.size(-1);
  IMMUNIZE_CHECK(h.size(-2) == p, op, "h", "have shape [*, p, p]", h.sizes());
  const Tensor flat = h.to(at::kDouble).reshape({h.numel() / (p * p), p, p});
  const Tensor largest = flat.abs().amax({1, 2}, /*keepdim=*/true);
  Scaled s;
  s.scale = power_of_two_scale(largest);
  const Tensor first = flat / s.scale, mirrored = first.mT();
  s.h = first * 0.5 + mirrored * 0.5;
  if (!check)
    return s;
  const Tensor asymmetry = (first - mirrored).abs().amax({1, 2});
  const double allowed = 8.0 * std::sqrt(static_cast<double>(p)) * epsilon_of(h.scalar_type());
  const Tensor unequal = asymmetry > (largest / s.scale).view({-1}) * allowed;
  const Tensor found =
      at::stack({largest.view({-1}).isfinite().logical_not(), unequal}).to(at::kInt).cpu();
  const int* bad = found.const_data_ptr<int>();
  const int64_t batch = flat.size(0);
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(
        bad[b] == 0, op, ": h must be finite, got NaN or infinity at batch index ", b,
        "; look for an overflow upstream, float16 features for instance");
    TORCH_CHECK_VALUE(
        bad[batch + b] == 0, op, ": h must be symmetric, got entries that differ by ",
        asymmetry[b].item<double>() * s.scale[b].item<double>(),
        " from their mirror image at batch index ", b,
        "; pass (h + h.mT) / 2 if the difference has no meaning");
  }
  return s;
}

// Eigenvalues ascending, vectors as columns, and which of them belong to each extreme.
struct Decomposed {
  Tensor lambda, v;    // [batch, p], [batch, p, p], of h / scale
  Tensor most, least;  // [batch, p], bool
};

Decomposed eigen(const Tensor& h, double cluster_rtol) {
  Decomposed d;
  std::tie(d.lambda, d.v) = at::linalg_eigh(h);
  const int64_t p = h.size(-1);
  const Tensor bottom = d.lambda.narrow(1, 0, 1), top = d.lambda.narrow(1, p - 1, 1);
  const Tensor near = at::maximum(bottom.abs(), top.abs()) * cluster_rtol;
  d.most = (top - d.lambda) <= near;
  d.least = (d.lambda - bottom) <= near;
  return d;
}

krylov::Extremes decomposed(const Tensor& h, double cluster_rtol) {
  const Decomposed d = eigen(h, cluster_rtol);
  const int64_t p = h.size(-1);
  return {
      at::ones({h.size(0)}, h.options().dtype(at::kBool)),
      d.lambda.select(1, p - 1),
      d.lambda.select(1, 0),
      d.most.sum(1),
      d.least.sum(1),
      d.v.select(2, p - 1),
      d.v.select(2, 0)};
}

// By Krylov spaces, and what they cannot prove by decomposition.
krylov::Extremes searched(const Tensor& h, double cluster_rtol) {
  krylov::Extremes x = krylov::extremes(h, cluster_rtol);
  const Tensor rest = x.proven.logical_not().nonzero().view({-1});
  if (rest.numel() == 0)
    return x;
  const krylov::Extremes y = decomposed(h.index_select(0, rest), cluster_rtol);
  const auto put = [&rest](const Tensor& to, const Tensor& from) {
    return to.index_copy(0, rest, from);
  };
  return {
      put(x.proven, y.proven),
      put(x.lambda_max, y.lambda_max),
      put(x.lambda_min, y.lambda_min),
      put(x.multiplicity_max, y.multiplicity_max),
      put(x.multiplicity_min, y.multiplicity_min),
      put(x.v_max, y.v_max),
      put(x.v_min, y.v_min)};
}

at::IntArrayRef batch_of(const Tensor& h) {
  return h.sizes().slice(0, h.dim() - 2);
}

std::vector<int64_t> with_side(at::IntArrayRef batch, int64_t side) {
  std::vector<int64_t> shape(batch.begin(), batch.end());
  shape.push_back(side);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> symmetric_extremes(
    const Tensor& h,  // [*, p, p]
    double cluster_rtol) {
  constexpr const char* op = "symmetric_extremes";
  const c10::OptionalDeviceGuard guard(h.device());
  const auto shape = batch_of(h);
  if (h.numel() == 0 && h.dim() >= 2) {
    check_floating_matrix(op, "h", h);
    const auto numbers = h.options().dtype(at::kDouble);
    const auto counts = h.options().dtype(at::kLong);
    return {
        at::empty(shape, numbers),
        at::empty(shape, numbers),
        at::empty(shape, counts),
        at::empty(shape, counts),
        at::empty(with_side(shape, h.size(-1)), numbers),
        at::empty(with_side(shape, h.size(-1)), numbers)};
  }
  const Scaled s = scaled_symmetric(op, h, /*check=*/true);
  const int64_t p = h.size(-1);
  const krylov::Extremes x =
      p < krylov::kSide ? decomposed(s.h, cluster_rtol) : searched(s.h, cluster_rtol);
  const Tensor scale = s.scale.view({-1});
  return {
      (x.lambda_max * scale).reshape(shape),
      (x.lambda_min * scale).reshape(shape),
      x.multiplicity_max.reshape(shape),
      x.multiplicity_min.reshape(shape),
      x.v_max.reshape(with_side(shape, p)).contiguous(),
      x.v_min.reshape(with_side(shape, p)).contiguous()};
}

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
  const c10::OptionalDeviceGuard guard(h.device());
  check_floating_matrix(op, "h", h);
  for (const Tensor& t : {grad_max, grad_min, multiplicity_max, multiplicity_min, v_max, v_min})
    check_same_device(op, "a gradient or a saved tensor", t, "h", h);
  const int64_t p = h.size(-1), batch = h.numel() / (p * p);
  const auto flat = [batch](const Tensor& t) { return t.to(at::kDouble).reshape({batch}); };
  const Tensor g_max = flat(grad_max), g_min = flat(grad_min);
  const Tensor m_max = multiplicity_max.reshape({batch}), m_min = multiplicity_min.reshape({batch});
  const Tensor x = v_max.reshape({batch, p}), y = v_min.reshape({batch, p});
  const auto outer = [](const Tensor& v, const Tensor& weight) {
    return (v * weight.unsqueeze(1)).unsqueeze(2) * v.unsqueeze(1);
  };
  Tensor grad = outer(x, g_max) + outer(y, g_min);
  if (batch > 0) {
    const Tensor wanted =
        (m_max > 1).logical_and(g_max != 0).logical_or((m_min > 1).logical_and(g_min != 0));
    refuse_capture(op, h);
    const Tensor index = wanted.nonzero().view({-1});
    if (index.numel() > 0) {
      const Scaled s =
          scaled_symmetric(op, h.reshape({batch, p, p}).index_select(0, index), /*check=*/false);
      const Decomposed d = eigen(s.h, cluster_rtol);
      const auto mean = [&index](const Tensor& members, const Tensor& g) {
        const Tensor each = members.to(at::kDouble);
        return each * (g.index_select(0, index).unsqueeze(1) / each.sum(1, /*keepdim=*/true));
      };
      const Tensor weight = mean(d.most, g_max) + mean(d.least, g_min);
      grad.index_copy_(0, index, at::bmm(d.v * weight.unsqueeze(1), d.v.mT()));
    }
  }
  return grad.reshape(h.sizes()).to(h.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  m.impl("symmetric_extremes", &symmetric_extremes);
  m.impl("symmetric_extremes_backward", &symmetric_extremes_backward);
}

}  // namespace immunize_ext
