// R_well and R_ill of K = x^T x in one operator, with K never formed.
//
//   R_well = lambda_max^2 / 2 - F / (2 p),                       F = |K|_F^2
//   R_ill  = 1 / D,  D = F / (2 k) - lambda_min^2 / 2,  dR_ill = -dD / D^2
//
// So dR = c_max d lambda_max + c_min d lambda_min + c_F dF with
//   R_well: c_max = lambda_max, c_F = -1 / (2 p);
//   R_ill:  c_min = lambda_min / D^2, c_F = -1 / (2 k D^2),
// and the gradient is that of the extremes (spectrum_engine.cpp): one product on the thin side. As
// R_well does not ask for the smallest eigenvalue nor R_ill for the vector of the largest, neither
// is computed. Second derivatives are in gram_regularizer_autograd.cpp.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "spectrum_common.h"
#include "spectrum_engine.h"

namespace immunize_ext {
namespace {

// D is a difference of two numbers of its own size or larger; below this fraction of the first,
// times the larger side, it is rounding: eigenvalues of a Gram matrix are known to a few max(n, p)
// eps of the largest.
constexpr double kVanishing = 8.0 * std::numeric_limits<double>::epsilon();

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gram_regularizer(
    const Tensor& x,  // [*, n, p]
    bool ill,
    std::optional<double> normaliser,
    std::optional<double> floor,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const char* op = ill ? "gram_r_ill" : "gram_r_well";
  check_floating_matrix(op, "x", x);
  const int64_t n = x.size(-2), p = x.size(-1), t = std::min(n, p), batch = x.numel() / (n * p);
  Wanted wanted;
  wanted.max = !ill;
  wanted.min = ill;
  wanted.long_vectors = false;
  const ExtremesBatch e =
      extremes_of(op, "x", x, p, {rank_rtol, cluster_rtol, full_rank}, wanted, /*of_gram=*/true);
  const auto options = e.lambda_max.options();
  const Tensor value = at::empty({batch}, options);
  const Tensor coefficients = at::zeros({batch, 3}, options);
  const Tensor multiplicity = ill ? e.multiplicity_min : e.multiplicity_max;
  for (int64_t b = 0; b < batch; ++b) {
    double* c = coefficients.mutable_data_ptr<double>() + 3 * b;
    double& result = value.mutable_data_ptr<double>()[b];
    const double squared_frobenius = e.squared_frobenius.const_data_ptr<double>()[b];
    const int64_t rank = e.rank.const_data_ptr<int64_t>()[b];
    // F is of degree 4 in x and leaves the range of float64 first: R_well is then infinite or zero,
    // R_ill the other way round, both with gradient 0.
    const bool overflows = std::isinf(squared_frobenius);
    if (overflows || (squared_frobenius == 0.0 && rank > 0)) {
      result = overflows != ill ? std::numeric_limits<double>::infinity() : 0.0;
      continue;
    }
    if (!ill) {
      const double width = 2.0 * normaliser.value_or(static_cast<double>(p));
      const double largest = e.lambda_max.const_data_ptr<double>()[b];
      result = largest * largest / 2.0 - squared_frobenius / width;
      c[0] = largest;
      c[2] = -1.0 / width;
      continue;
    }
    const double width = 2.0 * normaliser.value_or(static_cast<double>(std::max<int64_t>(rank, 1)));
    const double smallest = e.lambda_min.const_data_ptr<double>()[b];
    const double mean_square = squared_frobenius / width;
    const double denominator = mean_square - smallest * smallest / 2.0;
    const double least =
        mean_square * floor.value_or(kVanishing * static_cast<double>(std::max(n, p)));
    // One cluster of all singular values: what D has left of itself is rounding. Zeros that full
    // rank counts are no cluster: D is then |K|_F^2 / (2 k).
    const bool one_cluster =
        smallest > 0.0 && multiplicity.const_data_ptr<int64_t>()[b] >= rank;
    if (denominator <= least || (one_cluster && !normaliser && !floor)) {
      TORCH_CHECK_VALUE(
          floor.has_value(), op,
          ": x must not have all singular values equal (D = 0), got that at ", "batch index ", b,
          "; give a floor");
      // Held at the floor, with gradient 0.
      result = 1.0 / least;
      continue;
    }
    result = 1.0 / denominator;
    c[1] = smallest * result * result;
    c[2] = -result * result / width;
  }
  const auto shape = batch_shape(x);
  const Tensor& thin = n <= p ? (ill ? e.u_min : e.u_max) : (ill ? e.v_min : e.v_max);
  return {
      value.view(shape).to(x.scalar_type()), coefficients.view(with_side(shape, 3)),
      multiplicity.view(shape), thin.view(with_side(shape, t)),
      e.thin_gram.view(with_side(with_side(shape, t), t))};
}

Tensor gram_regularizer_backward(
    const Tensor& grad,  // [*]
    const Tensor& x,     // [*, n, p]
    const Tensor& coefficients,
    const Tensor& multiplicity,
    const Tensor& thin_vector,
    const Tensor& thin_gram,
    bool /*ill*/,
    std::optional<double> /*normaliser*/,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const int64_t n = x.size(-2), p = x.size(-1), batch = x.numel() / (n * p);
  const Tensor weights =
      coefficients.reshape({batch, 3}) * grad.to(at::kDouble).reshape({batch, 1});
  Saved saved;
  // The extreme that is not asked for has weight 0, so that its vector and multiplicity are moot.
  saved.multiplicity_max = saved.multiplicity_min = multiplicity;
  (n <= p ? saved.u_max : saved.v_max) = thin_vector;
  (n <= p ? saved.u_min : saved.v_min) = thin_vector;
  saved.thin_gram = thin_gram;
  return gradient_of(
      weights.select(1, 0), weights.select(1, 1), weights.select(1, 2), x, saved,
      {rank_rtol, cluster_rtol, full_rank});
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("gram_regularizer", &gram_regularizer);
  m.impl("gram_regularizer_backward", &gram_regularizer_backward);
}

}  // namespace immunize_ext
