// R_well and R_ill of K = x^T x in one operator, with K never formed.
//
//   R_well = lambda_max^2 / 2 - F / (2 p),                       F = |K|_F^2
//   R_ill  = 1 / D,  D = F / (2 k) - lambda_min^2 / 2,  dR_ill = -dD / D^2
//
// So dR = c_max d lambda_max + c_min d lambda_min + c_F dF with
//   R_well: c_max = lambda_max, c_F = -1 / (2 p);
//   R_ill:  c_min = lambda_min / D^2, c_F = -1 / (2 k D^2),
// and the gradient is that of the extremes (spectrum.cpp): one product on the thin side. As
// R_well does not ask for the smallest eigenvalue nor R_ill for the vector of the largest, neither
// is computed. Second derivatives are in gram_regularizer_autograd.cpp.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "spectrum.h"
#include "tensors.h"

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
  const MatrixBatch m = as_batch(op, "x", x);
  Wanted wanted;
  wanted.max = !ill;
  wanted.min = ill;
  wanted.long_vectors = false;
  const ExtremesBatch e = cpu_spectrum.extremes(
      op, "x", m, {rank_rtol, cluster_rtol, full_rank, m.p}, wanted, /*of_gram=*/true);
  const auto options = e.value_max.options();
  const Tensor value = at::empty({m.batch}, options);
  const Tensor coefficients = at::zeros({m.batch, 3}, options);
  const Tensor multiplicity = ill ? e.multiplicity_min : e.multiplicity_max;
  for (int64_t b = 0; b < m.batch; ++b) {
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
      const double width = 2.0 * normaliser.value_or(static_cast<double>(m.p));
      const double largest = e.value_max.const_data_ptr<double>()[b];
      result = largest * largest / 2.0 - squared_frobenius / width;
      c[0] = largest;
      c[2] = -1.0 / width;
      continue;
    }
    const double width = 2.0 * normaliser.value_or(static_cast<double>(std::max<int64_t>(rank, 1)));
    const double smallest = e.value_min.const_data_ptr<double>()[b];
    const double mean_square = squared_frobenius / width;
    const double denominator = mean_square - smallest * smallest / 2.0;
    const double least =
        mean_square * floor.value_or(kVanishing * static_cast<double>(std::max(m.n, m.p)));
    // One cluster of all singular values: what D has left of itself is rounding. Zeros that full
    // rank counts are no cluster: D is then |K|_F^2 / (2 k).
    const bool one_cluster = smallest > 0.0 && multiplicity.const_data_ptr<int64_t>()[b] >= rank;
    if (denominator <= least || (one_cluster && !normaliser && !floor)) {
      // Held, with gradient 0: at the floor that was given, or where D vanishes, which the count
      // tells the caller.
      if (!floor)
        multiplicity.mutable_data_ptr<int64_t>()[b] = 0;
      result = 1.0 / least;
      continue;
    }
    result = 1.0 / denominator;
    c[1] = smallest * result * result;
    c[2] = -result * result / width;
  }
  const auto shape = batch_shape(x);
  return {
      value.view(shape).to(x.scalar_type()), coefficients.view(with_sides(shape, {3})),
      multiplicity.view(shape), (ill ? e.thin_min : e.thin_max).view(with_sides(shape, {m.thin()})),
      e.thin_gram.view(with_sides(shape, {m.thin(), m.thin()}))};
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
  constexpr const char* op = "gram_regularizer_backward";
  const MatrixBatch m = as_batch(op, "x", x);
  const Tensor weights = saved_numbers(op, "coefficients", coefficients, x, {3}) *
                         incoming_gradient(op, "grad", grad, x).unsqueeze(1);
  GradientInputs in;
  in.grad_max = weights.select(1, 0).contiguous();
  in.grad_min = weights.select(1, 1).contiguous();
  in.grad_squared_frobenius = weights.select(1, 2).contiguous();
  // The extreme that is not asked for has weight 0, so that its vector and multiplicity are moot.
  in.multiplicity_max = in.multiplicity_min = saved_counts(op, "multiplicity", multiplicity, x);
  in.thin_max = in.thin_min = saved_numbers(op, "thin_vector", thin_vector, x, {m.thin()});
  in.thin_gram = saved_numbers(op, "thin_gram", thin_gram, x, {m.thin(), m.thin()});
  return cpu_spectrum.gradient(op, m, in, {rank_rtol, cluster_rtol, full_rank, m.p})
      .view(x.sizes())
      .to(x.scalar_type());
}

}  // namespace

// Other devices compose it from gram_extremes without a loss worth a kernel.
TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("gram_regularizer", &gram_regularizer);
  m.impl("gram_regularizer_backward", &gram_regularizer_backward);
}

}  // namespace immunize_ext
