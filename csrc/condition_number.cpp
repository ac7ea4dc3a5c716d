// The condition number of a matrix, or its logarithm, in one operator. For tensors on the CPU, whose
// matrices may be so small that the Python of a composition costs many times their arithmetic.
//
// With s_1 the largest and s_k the smallest singular value
//   kappa = s_1 / s_k:    d kappa = d s_1 / s_k - (s_1 / s_k^2) d s_k
//   log kappa:        d log kappa = d s_1 / s_1 - d s_k / s_k
// so the gradient is that of the extremes (spectrum.cpp) with two coefficients that the forward pass
// keeps. Where the gradient shall be differentiated again, by reverse or forward mode or under vmap,
// it is composed of operators that can be, from the same formulas.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "checks.h"
#include "plain_gradient.h"
#include "spectrum.h"
#include "tensors.h"

namespace immunize_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// kappa has no scale, but singular values near the ends of float64's range have overflowed or have
// no digits left. Where that may be, the powers of two [batch] that bring the largest entries near
// 1; else undefined.
Tensor inverse_scales(const MatrixBatch& m) {
  if (m.matrices.scalar_type() != at::kDouble)
    return {};
  const int64_t size = m.n * m.p;
  const double* from = m.matrices.const_data_ptr<double>();
  const auto largest_of = [&](int64_t b) {
    double largest = 0.0;
    for (int64_t i = b * size; i < (b + 1) * size; ++i)
      largest = std::max(largest, std::abs(from[i]));
    return largest;
  };
  bool within = true;
  for (int64_t b = 0; b < m.batch && within; ++b) {
    const double largest = largest_of(b);
    within = largest == 0.0 || (largest >= 0x1p-790 && largest <= 0x1p990);
  }
  if (within)
    return {};
  const Tensor scales = at::empty({m.batch}, m.matrices.options());
  for (int64_t b = 0; b < m.batch; ++b) {
    int exponent = 0;
    std::frexp(largest_of(b), &exponent);
    // Within the range of normal numbers, where products with it are exact.
    scales.mutable_data_ptr<double>()[b] = std::ldexp(1.0, std::clamp(-exponent, -1000, 1000));
  }
  return scales;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs condition_number(
    const Tensor& a,  // [*, n, p]
    bool logarithm,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const char* op = logarithm ? "log_condition_number" : "condition_number";
  const MatrixBatch m = as_batch(op, "a", a);
  const Tensor scales = inverse_scales(m);
  MatrixBatch within = m;
  if (scales.defined())
    within.matrices = m.matrices * scales.view({m.batch, 1, 1});
  const ExtremesBatch e = cpu_spectrum.extremes(
      op, "a", within, {rank_rtol, cluster_rtol, full_rank, m.thin()}, Wanted{},
      /*of_gram=*/false);
  const Tensor value = at::empty({m.batch}, e.value_max.options());
  const Tensor coefficients = at::empty({m.batch, 2}, e.value_max.options());
  const double* scale = scales.defined() ? scales.const_data_ptr<double>() : nullptr;
  const double* largest = e.value_max.const_data_ptr<double>();
  const double* smallest = e.value_min.const_data_ptr<double>();
  double *values = value.mutable_data_ptr<double>(), *c = coefficients.mutable_data_ptr<double>();
  for (int64_t b = 0; b < m.batch; ++b, c += 2) {
    const double kappa = largest[b] / smallest[b], factor = scale != nullptr ? scale[b] : 1.0;
    if (smallest[b] == 0.0) {
      // Infinite and, by the least-norm rule, with gradient 0.
      values[b] = std::numeric_limits<double>::infinity();
      c[0] = c[1] = 0.0;
    } else if (logarithm) {
      values[b] = std::log(largest[b]) - std::log(smallest[b]);
      c[0] = factor / largest[b];
      c[1] = -factor / smallest[b];
    } else {
      values[b] = kappa;
      c[0] = factor / smallest[b];
      c[1] = -factor * kappa / smallest[b];
    }
  }
  const auto shape = batch_shape(a);
  const SidedVectors v(e, m, shape);
  return {
      converted(value.view(shape), a.scalar_type()),
      coefficients.view(with_sides(shape, {2})),
      shaped(e.multiplicity_max, shape),
      shaped(e.multiplicity_min, shape),
      v.left_max,
      v.right_max,
      v.left_min,
      v.right_min};
}

Tensor condition_number_backward(
    const Tensor& grad,  // [*]
    const Tensor& a,     // [*, n, p]
    const Tensor& coefficients,
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "condition_number_backward";
  const MatrixBatch m = as_batch(op, "a", a);
  const Tensor factors = saved_numbers(op, "coefficients", coefficients, a, {2});
  const Tensor g = incoming_gradient(op, "grad", grad, a);
  GradientInputs in;
  in.grad_max = at::empty({m.batch}, factors.options());
  in.grad_min = at::empty({m.batch}, factors.options());
  const double *from = g.const_data_ptr<double>(), *c = factors.const_data_ptr<double>();
  double* of_max = in.grad_max.mutable_data_ptr<double>();
  double* of_min = in.grad_min.mutable_data_ptr<double>();
  for (int64_t b = 0; b < m.batch; ++b) {
    of_max[b] = from[b] * c[2 * b];
    of_min[b] = from[b] * c[2 * b + 1];
  }
  in.multiplicity_max = saved_counts(op, "multiplicity_max", multiplicity_max, a);
  in.multiplicity_min = saved_counts(op, "multiplicity_min", multiplicity_min, a);
  (m.wide() ? in.thin_max : in.long_max) = saved_numbers(op, "u_max", u_max, a, {m.n});
  (m.wide() ? in.long_max : in.thin_max) = saved_numbers(op, "v_max", v_max, a, {m.p});
  (m.wide() ? in.thin_min : in.long_min) = saved_numbers(op, "u_min", u_min, a, {m.n});
  (m.wide() ? in.long_min : in.thin_min) = saved_numbers(op, "v_min", v_min, a, {m.p});
  return cpu_spectrum.gradient(op, m, in, {rank_rtol, cluster_rtol, full_rank, m.thin()})
      .view(a.sizes())
      .to(a.scalar_type());
}

// --- derivatives ----------------------------------------------------------------------------------

struct Options {
  bool logarithm;
  double rank_rtol, cluster_rtol;
  bool full_rank;
};

// The gradient from operators that are differentiable in grad and a.
Tensor composed_gradient(
    const Tensor& grad, const Tensor& a, const Tensor& coefficients, const Options& o) {
  auto& dispatcher = c10::Dispatcher::singleton();
  using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  static const auto extremes =
      dispatcher.findSchemaOrThrow("immunize_ext::extremal_singular_values", "")
          .typed<Nine(const Tensor&, double, double, bool)>();
  static const auto gradient =
      dispatcher.findSchemaOrThrow("immunize_ext::extremal_singular_values_backward", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, bool)>();
  Tensor scales = inverse_scales(as_batch("condition_number", "a", a.detach()));
  if (scales.defined())
    scales = scales.view(with_sides(batch_shape(a), {1, 1}));
  const Tensor within = scales.defined() ? a * scales : a;
  const auto [s_max, s_min, rank, m_max, m_min, u1, v1, uk, vk] =
      extremes.call(within, o.rank_rtol, o.cluster_rtol, o.full_rank);
  // Where the value is infinite the gradient is zero; 1 keeps 0 / 0 out of it.
  const Tensor live = coefficients.ne(0.0).any(-1);
  const Tensor largest = at::where(live, s_max, 1.0), smallest = at::where(live, s_min, 1.0);
  const Tensor g = at::where(live, grad.to(at::kDouble), 0.0);
  const Tensor of_max = g / (o.logarithm ? largest : smallest);
  const Tensor of_min = o.logarithm ? -g / smallest : -g * largest / smallest.square();
  const Tensor out = gradient.call(
      of_max, of_min, within, m_max, m_min, u1, v1, uk, vk, o.rank_rtol, o.cluster_rtol,
      o.full_rank);
  return scales.defined() ? out * scales : out;
}

class ConditionNumber : public torch::autograd::Function<ConditionNumber> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& a,
      bool logarithm,
      double rank_rtol,
      double cluster_rtol,
      bool full_rank) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("immunize_ext::condition_number", "")
                               .typed<Outputs(const Tensor&, bool, double, double, bool)>();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, coefficients, m_max, m_min, u1, v1, uk, vk] =
        op.call(a, logarithm, rank_rtol, cluster_rtol, full_rank);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({a, coefficients, m_max, m_min, u1, v1, uk, vk});
    ctx->mark_non_differentiable({coefficients, m_max, m_min, u1, v1, uk, vk});
    ctx->saved_data["logarithm"] = logarithm;
    ctx->saved_data["rank_rtol"] = rank_rtol;
    ctx->saved_data["cluster_rtol"] = cluster_rtol;
    ctx->saved_data["full_rank"] = full_rank;
    return {value, coefficients, m_max, m_min, u1, v1, uk, vk};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(5);
    if (!grads[0].defined())
      return out;
    const auto saved = ctx->get_saved_variables();
    const Options o{
        ctx->saved_data["logarithm"].toBool(), ctx->saved_data["rank_rtol"].toDouble(),
        ctx->saved_data["cluster_rtol"].toDouble(), ctx->saved_data["full_rank"].toBool()};
    if (!wants_numbers_only({grads[0]})) {
      out[0] = composed_gradient(grads[0], saved[0], saved[1], o);
      return out;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("immunize_ext::condition_number_backward", "")
                               .typed<Tensor(
                                   const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, double, double, bool)>();
    at::AutoDispatchBelowADInplaceOrView below;
    out[0] = op.call(
        grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7],
        o.rank_rtol, o.cluster_rtol, o.full_rank);
    return out;
  }
};

Outputs forward_autograd(
    const Tensor& a, bool logarithm, double rank_rtol, double cluster_rtol, bool full_rank) {
  const auto out = ConditionNumber::apply(a, logarithm, rank_rtol, cluster_rtol, full_rank);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]};
}

}  // namespace

// Other devices compose it from extremal_singular_values without a loss worth a kernel.
TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("condition_number", &condition_number);
  m.impl("condition_number_backward", &condition_number_backward);
}

TORCH_LIBRARY_IMPL(immunize_ext, Autograd, m) {
  m.impl("condition_number", &forward_autograd);
}

}  // namespace immunize_ext
