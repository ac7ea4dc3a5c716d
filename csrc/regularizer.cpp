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
#include "regularizer.h"
#include "spectrum.h"
#include "tensors.h"
#ifdef IMMUNIZE_EXT_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#endif

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

const Range& range_of(const MatrixBatch& m, bool gram) {
  return !gram && m.matrices.scalar_type() == at::kFloat ? kWithinFloat : kWithin;
}

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
  const Range& range = range_of(m, gram);
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

const char* name_of(bool gram, bool ill) {
  return gram ? (ill ? "gram_r_ill" : "gram_r_well") : (ill ? "r_ill" : "r_well");
}

// One call: its names, its rules and what it asks of the spectrum.
struct Call {
  const char *op, *name;
  RegularizerRules rules;
  Policy policy;
  Wanted wanted;

  Call(
      const MatrixBatch& m,
      bool gram,
      bool ill,
      std::optional<double> normaliser,
      std::optional<double> floor,
      double rank_rtol,
      double cluster_rtol,
      bool full_rank)
      : op(name_of(gram, ill)), name(gram ? "x" : "s") {
    const int64_t full_side = gram ? m.p : m.thin();
    rules.ill = ill;
    rules.normaliser = normaliser.value_or(0.0);
    rules.floor = floor.value_or(0.0);
    rules.side = static_cast<double>(full_side);
    rules.vanishing = (gram ? 1.0 : 0.5) * kVanishing * static_cast<double>(std::max(m.n, m.p));
    policy = {rank_rtol, cluster_rtol, full_rank, full_side};
    wanted.max = !ill;
    wanted.min = ill;
    wanted.long_vectors = !gram;
  }
};

RegularizerTensors tensors_of(
    const ExtremesBatch& e,
    const Tensor& squares,
    bool ill,
    const Tensor& value,
    const Tensor& coefficients) {
  return {
      ill ? e.value_min : e.value_max,
      squares,
      e.rank,
      ill ? e.multiplicity_min : e.multiplicity_max,
      value,
      coefficients};
}

// On the host, in float64.
void evaluate(const RegularizerRules& rules, const RegularizerTensors& t) {
  const double* extremes = t.extreme.const_data_ptr<double>();
  const double* squares = t.squared_frobenius.const_data_ptr<double>();
  const int64_t* ranks = t.rank.const_data_ptr<int64_t>();
  int64_t* multiplicities = t.multiplicity.mutable_data_ptr<int64_t>();
  double* values = t.value.mutable_data_ptr<double>();
  double* c = t.coefficients.mutable_data_ptr<double>();
  for (int64_t b = 0; b < t.value.size(0); ++b, c += 4) {
    const RegularizerValue found =
        regularizer_of(rules, extremes[b], squares[b], ranks[b], multiplicities[b]);
    values[b] = found.value;
    c[0] = rules.ill ? 0.0 : found.extreme_weight;
    c[1] = rules.ill ? found.extreme_weight : 0.0;
    c[2] = found.norm_weight;
    c[3] = 1.0;
    if (found.vanishes)
      multiplicities[b] = 0;
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs outputs(
    const Tensor& x,
    const MatrixBatch& m,
    const ExtremesBatch& e,
    bool gram,
    bool ill,
    const Tensor& value,
    const Tensor& coefficients) {
  const auto shape = batch_shape(x);
  return {
      converted(shaped(value, shape), x.scalar_type()),
      shaped(coefficients, with_sides(shape, {4})),
      shaped(ill ? e.multiplicity_min : e.multiplicity_max, shape),
      shaped(ill ? e.thin_min : e.thin_max, with_sides(shape, {m.thin()})),
      gram ? shaped(e.thin_gram, with_sides(shape, {m.thin(), m.thin()}))
           : shaped(ill ? e.long_min : e.long_max, with_sides(shape, {std::max(m.n, m.p)}))};
}

Outputs regularizer(
    const Tensor& x,  // [*, n, p]
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    std::optional<double> floor,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const MatrixBatch m = as_batch(name_of(gram, ill), gram ? "x" : "s", x);
  const Call call(m, gram, ill, normaliser, floor, rank_rtol, cluster_rtol, full_rank);
  Parts parts = parts_of(call.op, m, call.policy, call.wanted, gram);
  const Tensor factors = factors_of(m, parts, gram);
  if (factors.defined())
    parts = parts_of(call.op, rescaled(m, factors), call.policy, call.wanted, gram);
  const ExtremesBatch& e = parts.extremes;
  const auto options = parts.squared_frobenius.options();
  const Tensor value = at::empty({m.batch}, options);
  const Tensor coefficients = at::empty({m.batch, 4}, options);
  evaluate(call.rules, tensors_of(e, parts.squared_frobenius, ill, value, coefficients));
  if (factors.defined()) {
    coefficients.select(1, 3).copy_(factors);
    value.copy_(times_powers(value, factors, -degree_of(gram, ill)));
  }
  return outputs(x, m, e, gram, ill, value, coefficients);
}

// Of the extreme that is asked for; the other one has weight 0, so that its vector and multiplicity
// are moot.
GradientInputs gradient_inputs(
    const char* op,
    const Tensor& x,
    const MatrixBatch& m,
    const Tensor& weights,  // [batch, 4]
    const Tensor& multiplicity,
    const Tensor& thin_vector,
    const Tensor& companion,
    bool gram) {
  GradientInputs in;
  in.grad_max = weights.select(1, 0).contiguous();
  in.grad_min = weights.select(1, 1).contiguous();
  in.multiplicity_max = in.multiplicity_min = saved_counts(op, "multiplicity", multiplicity, x);
  in.thin_max = in.thin_min = saved_numbers(op, "thin_vector", thin_vector, x, {m.thin()});
  if (gram) {
    in.grad_squared_frobenius = weights.select(1, 2).contiguous();
    in.thin_gram = saved_numbers(op, "companion", companion, x, {m.thin(), m.thin()});
  } else {
    in.long_max = in.long_min = saved_numbers(op, "companion", companion, x, {std::max(m.n, m.p)});
  }
  return in;
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
  const GradientInputs in =
      gradient_inputs(op, x, m, weights, multiplicity, thin_vector, companion, gram);
  const Policy policy{rank_rtol, cluster_rtol, full_rank, gram ? m.p : m.thin()};
  Tensor out = cpu_spectrum.gradient(op, m, in, policy);
  if (!gram)
    out.add_(m.matrices * (2.0 * weights.select(1, 2)).view({-1, 1, 1}));
  if (factors.defined())
    out = times_powers(out, factors.view({m.batch, 1, 1}), 1 - degree_of(gram, ill));
  return out.view(x.sizes()).to(x.scalar_type());
}

#ifdef IMMUNIZE_EXT_WITH_CUDA

// On a GPU nothing is read on the host, so that a call can be captured into a CUDA graph. Matrices
// whose squares leave the range are marked by multiplicity -1 and left to the caller, who reads
// multiplicities anyway.
Outputs regularizer_cuda(
    const Tensor& x,
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    std::optional<double> floor,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const MatrixBatch m = as_batch(name_of(gram, ill), gram ? "x" : "s", x);
  const c10::OptionalDeviceGuard guard(x.device());
  const Call call(m, gram, ill, normaliser, floor, rank_rtol, cluster_rtol, full_rank);
  Wanted wanted = call.wanted;
  wanted.long_vectors = true;  // the kernels write them anyway
  const ExtremesBatch e = cuda_spectrum.extremes(call.op, call.name, m, call.policy, wanted, gram);
  const auto options = e.value_max.options();
  const Tensor squares =
      gram ? e.squared_frobenius : m.matrices.to(at::kDouble).square().sum({1, 2});
  // Tensors on the CPU come from tests of what is composed here.
  const bool on_card = x.is_cuda();
  const Tensor value = at::empty({m.batch}, on_card ? m.matrices.options() : options);
  const Tensor coefficients = at::empty({m.batch, 4}, options);
  const RegularizerTensors t = tensors_of(e, squares, ill, value, coefficients);
  const Range& range = range_of(m, gram);
  if (on_card)
    regularizer_on_device(t, call.rules, range.least, range.most);
  else
    evaluate(call.rules, t);
  return outputs(x, m, e, gram, ill, value, coefficients);
}

Tensor regularizer_backward_cuda(
    const Tensor& grad,
    const Tensor& x,
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
  const c10::OptionalDeviceGuard guard(x.device());
  const Tensor saved = saved_numbers(op, "coefficients", coefficients, x, {4});
  const Tensor weights = saved * incoming_gradient(op, "grad", grad, x).unsqueeze(1);
  GradientInputs in =
      gradient_inputs(op, x, m, weights, multiplicity, thin_vector, companion, gram);
  if (gram) {
    // 2 sqrt(lambda) u v^T with v = x^T u / sqrt(lambda): as if lambda were 1 and v = x^T u.
    const Tensor wide = m.matrices.to(at::kDouble), u = in.thin_max.unsqueeze(m.wide() ? 1 : 2);
    in.long_max = in.long_min =
        m.wide() ? at::bmm(u, wide).squeeze(1) : at::bmm(wide, u).squeeze(2);
    in.lambda_max = in.lambda_min = saved.select(1, 3).contiguous();
  }
  const Tensor out = cuda_spectrum.gradient(
      op, m, in, {rank_rtol, cluster_rtol, full_rank, gram ? m.p : m.thin()});
  if (!gram)
    out.add_(m.matrices * (2.0 * weights.select(1, 2)).view({-1, 1, 1}));
  return out.view(x.sizes()).to(x.scalar_type());
}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("regularizer", &regularizer);
  m.impl("regularizer_backward", &regularizer_backward);
}

#ifdef IMMUNIZE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  m.impl("regularizer", &regularizer_cuda);
  m.impl("regularizer_backward", &regularizer_backward_cuda);
}
#endif

}  // namespace immunize_ext
