// R_well and R_ill of a matrix S in one operator, S = x or S = K = x^T x with K never formed.
//
//   R_well = s_max^2 / 2 - F / (2 p),                   F = |S|_F^2, s the singular values of S
//   R_ill  = 1 / D,  D = F / (2 k) - s_min^2 / 2,       dR_ill = -dD / D^2
//
// So dR = c_max d s_max + c_min d s_min + c_F dF with
//   R_well: c_max = s_max, c_F = -1 / (2 p);
//   R_ill:  c_min = s_min / D^2, c_F = -1 / (2 k D^2),
// and the gradient is that of the extremes (spectrum.cpp): for K one product on the thin side, for x
// itself a matrix of rank one and a multiple of x. As R_well does not ask for the smallest value nor
// R_ill for the vector of the largest, neither is computed. Second derivatives are in
// regularizer_autograd.cpp.

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
// eps of the largest, singular values to half of it.
constexpr double kVanishing = 8.0 * std::numeric_limits<double>::epsilon();

// |x_b|_F^2 of each matrix, in one order whatever the number of threads.
template <typename T>
void squared_norms(const MatrixBatch& m, double* out) {
  constexpr int64_t lanes = 8;  // sums that do not wait for each other
  const int64_t count = m.n * m.p;
  for (int64_t b = 0; b < m.batch; ++b) {
    const T* x = m.matrices.const_data_ptr<T>() + b * count;
    double sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
      for (int64_t q = 0; q < lanes; ++q)
        sums[q] += static_cast<double>(x[i + q]) * static_cast<double>(x[i + q]);
    for (; i < count; ++i)
      sums[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    out[b] = 0.0;
    for (const double sum : sums)
      out[b] += sum;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> regularizer(
    const Tensor& x,  // [*, n, p]
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    std::optional<double> floor,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const char* op = gram ? (ill ? "gram_r_ill" : "gram_r_well") : (ill ? "r_ill" : "r_well");
  const char* name = gram ? "x" : "s";
  const MatrixBatch m = as_batch(op, name, x);
  const int64_t full_side = gram ? m.p : m.thin();
  Wanted wanted;
  wanted.max = !ill;
  wanted.min = ill;
  wanted.long_vectors = !gram;
  const ExtremesBatch e = cpu_spectrum.extremes(
      op, name, m, {rank_rtol, cluster_rtol, full_rank, full_side}, wanted, gram);
  const auto options = e.value_max.options();
  const Tensor squares = gram ? e.squared_frobenius : at::empty({m.batch}, options);
  if (!gram && m.matrices.scalar_type() == at::kDouble)
    squared_norms<double>(m, squares.mutable_data_ptr<double>());
  else if (!gram)
    squared_norms<float>(m, squares.mutable_data_ptr<double>());
  const double vanishing =
      (gram ? 1.0 : 0.5) * kVanishing * static_cast<double>(std::max(m.n, m.p));
  const Tensor value = at::empty({m.batch}, options);
  const Tensor coefficients = at::zeros({m.batch, 3}, options);
  const Tensor multiplicity = ill ? e.multiplicity_min : e.multiplicity_max;
  for (int64_t b = 0; b < m.batch; ++b) {
    double* c = coefficients.mutable_data_ptr<double>() + 3 * b;
    double& result = value.mutable_data_ptr<double>()[b];
    const double squared_frobenius = squares.const_data_ptr<double>()[b];
    const int64_t rank = e.rank.const_data_ptr<int64_t>()[b];
    // F leaves the range of float64 first, of degree 4 in x for K: R_well is then infinite or zero,
    // R_ill the other way round, both with gradient 0.
    const bool overflows = std::isinf(squared_frobenius);
    if (overflows || (squared_frobenius == 0.0 && rank > 0 && (gram || ill))) {
      result = overflows != ill ? std::numeric_limits<double>::infinity() : 0.0;
      continue;
    }
    if (!ill) {
      const double width = 2.0 * normaliser.value_or(static_cast<double>(full_side));
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
    const double least = mean_square * floor.value_or(vanishing);
    // One cluster of all singular values: what D has left of itself is rounding. Zeros that full
    // rank counts are no cluster: D is then F / (2 k).
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
  const int64_t longer = std::max(m.n, m.p);
  return {
      value.view(shape).to(x.scalar_type()), coefficients.view(with_sides(shape, {3})),
      multiplicity.view(shape), (ill ? e.thin_min : e.thin_max).view(with_sides(shape, {m.thin()})),
      gram ? e.thin_gram.view(with_sides(shape, {m.thin(), m.thin()}))
           : (ill ? e.long_min : e.long_max).view(with_sides(shape, {longer}))};
}

Tensor regularizer_backward(
    const Tensor& grad,  // [*]
    const Tensor& x,     // [*, n, p]
    const Tensor& coefficients,
    const Tensor& multiplicity,
    const Tensor& thin_vector,
    const Tensor& companion,
    bool gram,
    bool /*ill*/,
    std::optional<double> /*normaliser*/,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "regularizer_backward";
  const MatrixBatch m = as_batch(op, "x", x);
  const Tensor weights = saved_numbers(op, "coefficients", coefficients, x, {3}) *
                         incoming_gradient(op, "grad", grad, x).unsqueeze(1);
  GradientInputs in;
  in.grad_max = weights.select(1, 0).contiguous();
  in.grad_min = weights.select(1, 1).contiguous();
  // The extreme that is not asked for has weight 0, so that its vector and multiplicity are moot.
  in.multiplicity_max = in.multiplicity_min = saved_counts(op, "multiplicity", multiplicity, x);
  in.thin_max = in.thin_min = saved_numbers(op, "thin_vector", thin_vector, x, {m.thin()});
  const Policy policy{rank_rtol, cluster_rtol, full_rank, gram ? m.p : m.thin()};
  if (gram) {
    in.grad_squared_frobenius = weights.select(1, 2).contiguous();
    in.thin_gram = saved_numbers(op, "companion", companion, x, {m.thin(), m.thin()});
    return cpu_spectrum.gradient(op, m, in, policy).view(x.sizes()).to(x.scalar_type());
  }
  in.long_max = in.long_min = saved_numbers(op, "companion", companion, x, {std::max(m.n, m.p)});
  const Tensor grad_norm = m.matrices * (2.0 * weights.select(1, 2)).view({-1, 1, 1});
  return cpu_spectrum.gradient(op, m, in, policy)
      .add_(grad_norm)
      .view(x.sizes())
      .to(x.scalar_type());
}

}  // namespace

// Other devices compose it from the extremes without a loss worth a kernel.
TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("regularizer", &regularizer);
  m.impl("regularizer_backward", &regularizer_backward);
}

}  // namespace immunize_ext
