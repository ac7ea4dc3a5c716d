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
//
// R_ill is of degree -2 in S, its gradient of -3 and for K = x^T x of -5 in x, so that D^2 leaves the
// range of float64 long before x or the gradient does. There all of it is that of y = f x, f the
// power of two that brings the largest entry of x near 1. With R of degree d,
//   R(x) = f^-d R(y),   dR/dx = f^(1-d) dR/dy,   d2R/dx2 = f^(2-d) d2R/dy2,
// exactly, and infinite or zero only where the numbers themselves are.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
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

// Between these squares of |S|_F no power of it that a derivative is made of leaves the range.
struct Range {
  double least, most;
  bool holds(double squared_frobenius) const {  // not of NaN
    return squared_frobenius >= least && squared_frobenius <= most;
  }
};
constexpr Range kWithin{0x1p-256, 0x1p256};
// The gradient of S is a sum of two parts in the type of S: neither may overflow on its own.
constexpr Range kWithinFloat{0x1p-64, 0x1p64};

// What R is made of: the extremes of S and |S|_F^2 [batch].
struct Parts {
  ExtremesBatch extremes;
  Tensor squared_frobenius;
};

Parts parts_of(
    const char* op, const MatrixBatch& m, const Policy& policy, const Wanted& wanted, bool gram) {
  ExtremesBatch e = cpu_spectrum.extremes(op, gram ? "x" : "s", m, policy, wanted, gram);
  if (gram)
    return {e, e.squared_frobenius};
  const Tensor squares = at::empty({m.batch}, e.value_max.options());
  if (m.matrices.scalar_type() == at::kDouble)
    squared_norms<double>(m, squares.mutable_data_ptr<double>());
  else
    squared_norms<float>(m, squares.mutable_data_ptr<double>());
  return {e, squares};
}

// The factors f [batch], 1 for matrices within the range and for zero; undefined if all are.
Tensor factors_of(const MatrixBatch& m, const Parts& parts, bool gram) {
  const bool narrow = !gram && m.matrices.scalar_type() == at::kFloat;
  const Range& range = narrow ? kWithinFloat : kWithin;
  const double* squares = parts.squared_frobenius.const_data_ptr<double>();
  Tensor factors;
  for (int64_t b = 0; b < m.batch; ++b) {
    if (range.holds(squares[b]))
      continue;
    const double largest = m.matrices[b].abs().max().item<double>();
    if (largest == 0.0)
      continue;
    if (!factors.defined())
      factors = at::ones({m.batch}, parts.squared_frobenius.options());
    int exponent = 0;
    std::frexp(largest, &exponent);
    // Within the range of normal numbers, where products with it are exact.
    factors.mutable_data_ptr<double>()[b] = std::ldexp(1.0, std::clamp(-exponent, -1000, 1000));
  }
  return factors;
}

MatrixBatch rescaled(const MatrixBatch& m, const Tensor& factors) {
  MatrixBatch y = m;
  y.matrices = m.matrices.to(at::kDouble) * factors.view({m.batch, 1, 1});
  return y;
}

int degree_of(bool gram, bool ill) {
  return (ill ? -2 : 2) * (gram ? 2 : 1);
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
  const Policy policy{rank_rtol, cluster_rtol, full_rank, full_side};
  Parts parts = parts_of(op, m, policy, wanted, gram);
  const Tensor factors = factors_of(m, parts, gram);
  if (factors.defined())
    parts = parts_of(op, rescaled(m, factors), policy, wanted, gram);
  const ExtremesBatch& e = parts.extremes;
  const Tensor& squares = parts.squared_frobenius;
  const auto options = squares.options();
  const double vanishing =
      (gram ? 1.0 : 0.5) * kVanishing * static_cast<double>(std::max(m.n, m.p));
  const Tensor value = at::empty({m.batch}, options);
  const Tensor coefficients = at::zeros({m.batch, 4}, options);
  const Tensor multiplicity = ill ? e.multiplicity_min : e.multiplicity_max;
  for (int64_t b = 0; b < m.batch; ++b) {
    double* c = coefficients.mutable_data_ptr<double>() + 4 * b;
    double& result = value.mutable_data_ptr<double>()[b];
    const double squared_frobenius = squares.const_data_ptr<double>()[b];
    const int64_t rank = e.rank.const_data_ptr<int64_t>()[b];
    c[3] = factors.defined() ? factors.const_data_ptr<double>()[b] : 1.0;
    const auto in_units_of_x = [&](double of_y) {
      return std::ldexp(of_y, -degree_of(gram, ill) * std::ilogb(c[3]));
    };
    if (!ill) {
      const double width = 2.0 * normaliser.value_or(static_cast<double>(full_side));
      const double largest = e.value_max.const_data_ptr<double>()[b];
      result = in_units_of_x(largest * largest / 2.0 - squared_frobenius / width);
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
      result = in_units_of_x(1.0 / least);
      continue;
    }
    const double inverse = 1.0 / denominator;
    result = in_units_of_x(inverse);
    c[1] = smallest * inverse * inverse;
    c[2] = -inverse * inverse / width;
  }
  const auto shape = batch_shape(x);
  const int64_t longer = std::max(m.n, m.p);
  return {
      value.view(shape).to(x.scalar_type()), coefficients.view(with_sides(shape, {4})),
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
    bool ill,
    std::optional<double> /*normaliser*/,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "regularizer_backward";
  MatrixBatch m = as_batch(op, "x", x);
  const Tensor saved = saved_numbers(op, "coefficients", coefficients, x, {4});
  const Tensor weights = saved * incoming_gradient(op, "grad", grad, x).unsqueeze(1);
  const double* factor = saved.const_data_ptr<double>() + 3;
  Tensor factors;
  for (int64_t b = 0; b < m.batch && !factors.defined(); ++b)
    if (factor[4 * b] != 1.0)
      factors = saved.select(1, 3);
  if (factors.defined())
    m = rescaled(m, factors);
  GradientInputs in;
  in.grad_max = weights.select(1, 0).contiguous();
  in.grad_min = weights.select(1, 1).contiguous();
  // The extreme that is not asked for has weight 0, so that its vector and multiplicity are moot.
  in.multiplicity_max = in.multiplicity_min = saved_counts(op, "multiplicity", multiplicity, x);
  in.thin_max = in.thin_min = saved_numbers(op, "thin_vector", thin_vector, x, {m.thin()});
  if (gram) {
    in.grad_squared_frobenius = weights.select(1, 2).contiguous();
    in.thin_gram = saved_numbers(op, "companion", companion, x, {m.thin(), m.thin()});
  } else {
    in.long_max = in.long_min = saved_numbers(op, "companion", companion, x, {std::max(m.n, m.p)});
  }
  const Policy policy{rank_rtol, cluster_rtol, full_rank, gram ? m.p : m.thin()};
  Tensor out = cpu_spectrum.gradient(op, m, in, policy);
  if (!gram)
    out.add_(m.matrices * (2.0 * weights.select(1, 2)).view({-1, 1, 1}));
  if (factors.defined())
    out = times_powers(out, factors.view({m.batch, 1, 1}), 1 - degree_of(gram, ill));
  return out.view(x.sizes()).to(x.scalar_type());
}

}  // namespace

// Other devices compose it from the extremes without a loss worth a kernel.
TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("regularizer", &regularizer);
  m.impl("regularizer_backward", &regularizer_backward);
}

}  // namespace immunize_ext
