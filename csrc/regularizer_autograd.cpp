// Derivatives of regularizer in C++: at 64 x 784 the Python of a composition would cost more than
// the arithmetic. Device-independent.
//
// With the coefficients c of regularizer.cpp the gradient is g c_i d s_i/dx, summed over i = max,
// min, F with s_F = F. For a cotangent Z of it, with d_i = <Z, d s_i/dx> and H = d c_i / d s_j,
//   d/dg = sum c_i d_i,
//   d/dx = g c_i (second derivative of s_i) Z + g (H d)_i d s_i/dx.
// H is 1 at (max, max) for R_well. For R_ill, with D_i = (0, -s_min, 1 / (2 k)), D_minmin = -1:
//   H_ij = 2 D_i D_j / D^3 - D_ij / D^2.
// Of x itself dF/dx = 2 x. The coefficients are those of y = f x (regularizer.cpp), and so is all of
// this, up to powers of f.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "tensors.h"

namespace immunize_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs call_forward(
    const Tensor& x,
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    std::optional<double> floor,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("immunize_ext::regularizer", "")
                             .typed<Outputs(
                                 const Tensor&, bool, bool, std::optional<double>,
                                 std::optional<double>, double, double, bool)>();
  return op.call(x, gram, ill, normaliser, floor, rank_rtol, cluster_rtol, full_rank);
}

Tensor call_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& coefficients,
    const Tensor& multiplicity,
    const Tensor& thin_vector,
    const Tensor& companion,
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("immunize_ext::regularizer_backward", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
              const Tensor&, bool, bool, std::optional<double>, double, double, bool)>();
  return op.call(
      grad, x, coefficients, multiplicity, thin_vector, companion, gram, ill, normaliser, rank_rtol,
      cluster_rtol, full_rank);
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Eleven = std::
    tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The weights H d of the d s_i/dx, not yet times g.
struct Weights {
  Tensor max, min, norm;
};

Weights second_weights(
    bool ill,
    std::optional<double> normaliser,
    const Tensor& smallest,
    const Tensor& rank,
    const Tensor& c_norm,
    const Tensor& d_max,
    const Tensor& d_min,
    const Tensor& d_norm) {
  const Tensor zero = at::zeros_like(d_max);
  if (!ill)
    return {d_max, zero, zero};
  // c_F = -1 / (2 k D^2) is 0 exactly where R_ill is held at its floor.
  const Tensor width = normaliser ? at::full_like(d_max, 2.0 * *normaliser)
                                  : 2.0 * rank.clamp_min(1).to(at::kDouble);
  const Tensor inverse_square = -c_norm * width;            // 1 / D^2
  const Tensor twice_cube = 2.0 * inverse_square.pow(1.5);  // 2 / D^3
  const Tensor along = d_norm / width - smallest * d_min;   // D_j d_j
  return {zero, inverse_square * d_min - twice_cube * smallest * along, twice_cube * along / width};
}

// d/dg and d/dx of <cotangent, gradient of the regularizer>, where the factor f is 1; float64.
std::tuple<Tensor, Tensor> double_backward_within(
    const Tensor& cotangent,
    const Tensor& g,
    const Tensor& x,
    const Tensor& coefficients,
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const Tensor c_max = coefficients.select(-1, 0), c_min = coefficients.select(-1, 1);
  const Tensor c_norm = coefficients.select(-1, 2);
  if (gram) {
    static const auto extremes = dispatcher.findSchemaOrThrow("immunize_ext::gram_extremes", "")
                                     .typed<Eleven(const Tensor&, double, double, bool)>();
    static const auto first =
        dispatcher.findSchemaOrThrow("immunize_ext::gram_extremes_backward", "")
            .typed<Tensor(
                const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const Tensor&, const Tensor&, double, double, bool)>();
    static const auto second =
        dispatcher.findSchemaOrThrow("immunize_ext::gram_extremes_double_backward", "")
            .typed<std::tuple<Tensor, Tensor, Tensor, Tensor>(
                const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                double, bool)>();
    const auto [largest, smallest, norm, rank, m_max, m_min, u1, v1, uk, vk, thin_gram] =
        extremes.call(x, rank_rtol, cluster_rtol, full_rank);
    const auto [d_max, d_min, d_norm, grad_x] = second.call(
        cotangent, g * c_max, g * c_min, g * c_norm, x, rank_rtol, cluster_rtol, full_rank);
    const Weights h = second_weights(ill, normaliser, smallest, rank, c_norm, d_max, d_min, d_norm);
    return {
        c_max * d_max + c_min * d_min + c_norm * d_norm,
        grad_x + first.call(
                     g * h.max, g * h.min, g * h.norm, x, largest, smallest, m_max, m_min, u1, v1,
                     uk, vk, thin_gram, rank_rtol, cluster_rtol, full_rank)};
  }
  static const auto extremes =
      dispatcher.findSchemaOrThrow("immunize_ext::extremal_singular_values", "")
          .typed<Nine(const Tensor&, double, double, bool)>();
  static const auto first =
      dispatcher.findSchemaOrThrow("immunize_ext::extremal_singular_values_backward", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, bool)>();
  static const auto second =
      dispatcher.findSchemaOrThrow("immunize_ext::extremal_singular_values_double_backward", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, bool)>();
  const auto [largest, smallest, rank, m_max, m_min, u1, v1, uk, vk] =
      extremes.call(x, rank_rtol, cluster_rtol, full_rank);
  const auto [d_max, d_min, grad_x] =
      second.call(cotangent, g * c_max, g * c_min, x, rank_rtol, cluster_rtol, full_rank);
  const Tensor d_norm = 2.0 * (cotangent * x).sum(-1).sum(-1);
  const Weights h = second_weights(ill, normaliser, smallest, rank, c_norm, d_max, d_min, d_norm);
  const auto sides = [](const Tensor& weight) { return weight.unsqueeze(-1).unsqueeze(-1); };
  const Tensor norm_part = 2.0 * (sides(g * c_norm) * cotangent + sides(g * h.norm) * x);
  return {
      c_max * d_max + c_min * d_min + c_norm * d_norm,
      grad_x + norm_part +
          first.call(
              g * h.max, g * h.min, x, m_max, m_min, u1, v1, uk, vk, rank_rtol, cluster_rtol,
              full_rank)};
}

std::tuple<Tensor, Tensor> double_backward(
    const Tensor& cotangent,
    const Tensor& grad,
    const Tensor& x,
    const Tensor& coefficients,
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const Tensor factor = coefficients.select(-1, 3), sides = factor.unsqueeze(-1).unsqueeze(-1);
  const int degree = (ill ? -2 : 2) * (gram ? 2 : 1);
  const auto [grad_g, grad_x] = double_backward_within(
      cotangent.to(at::kDouble), grad.to(at::kDouble), x.to(at::kDouble) * sides, coefficients,
      gram, ill, normaliser, rank_rtol, cluster_rtol, full_rank);
  return {
      times_powers(grad_g, factor, 1 - degree).to(grad.scalar_type()),
      times_powers(grad_x, sides, 2 - degree).to(x.scalar_type())};
}

class RegularizerBackward : public Function<RegularizerBackward> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& grad,
      const Tensor& x,
      const Tensor& coefficients,
      const Tensor& multiplicity,
      const Tensor& thin_vector,
      const Tensor& companion,
      bool gram,
      bool ill,
      std::optional<double> normaliser,
      double rank_rtol,
      double cluster_rtol,
      bool full_rank) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad, x, coefficients});
    ctx->saved_data["gram"] = gram;
    ctx->saved_data["ill"] = ill;
    ctx->saved_data["normaliser"] = normaliser;
    ctx->saved_data["rank_rtol"] = rank_rtol;
    ctx->saved_data["cluster_rtol"] = cluster_rtol;
    ctx->saved_data["full_rank"] = full_rank;
    return call_backward(
        grad, x, coefficients, multiplicity, thin_vector, companion, gram, ill, normaliser,
        rank_rtol, cluster_rtol, full_rank);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (at::GradMode::is_enabled())
      TORCH_CHECK_NOT_IMPLEMENTED(
          !grads[0].requires_grad() && !saved[0].requires_grad() && !saved[1].requires_grad(),
          "r_well, r_ill, gram_r_well, gram_r_ill: third derivatives are not implemented");
    const auto [grad_g, grad_x] = double_backward(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["gram"].toBool(),
        ctx->saved_data["ill"].toBool(), ctx->saved_data["normaliser"].toOptional<double>(),
        ctx->saved_data["rank_rtol"].toDouble(), ctx->saved_data["cluster_rtol"].toDouble(),
        ctx->saved_data["full_rank"].toBool());
    variable_list out(12);
    out[0] = grad_g;
    out[1] = grad_x;
    return out;
  }
};

Tensor backward_autograd(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& coefficients,
    const Tensor& multiplicity,
    const Tensor& thin_vector,
    const Tensor& companion,
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  return RegularizerBackward::apply(
      grad, x, coefficients, multiplicity, thin_vector, companion, gram, ill, normaliser, rank_rtol,
      cluster_rtol, full_rank);
}

class Regularizer : public Function<Regularizer> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& x,
      bool gram,
      bool ill,
      std::optional<double> normaliser,
      std::optional<double> floor,
      double rank_rtol,
      double cluster_rtol,
      bool full_rank) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);  // of all but the value: a launch for each on a device
    auto [value, coefficients, multiplicity, thin_vector, companion] =
        call_forward(x, gram, ill, normaliser, floor, rank_rtol, cluster_rtol, full_rank);
    ctx->save_for_backward({x, coefficients, multiplicity, thin_vector, companion});
    ctx->mark_non_differentiable({coefficients, multiplicity, thin_vector, companion});
    ctx->saved_data["gram"] = gram;
    ctx->saved_data["ill"] = ill;
    ctx->saved_data["normaliser"] = normaliser;
    ctx->saved_data["rank_rtol"] = rank_rtol;
    ctx->saved_data["cluster_rtol"] = cluster_rtol;
    ctx->saved_data["full_rank"] = full_rank;
    return {value, coefficients, multiplicity, thin_vector, companion};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto gradient = [&](const Tensor& grad) {
      return call_backward(
          grad, saved[0], saved[1], saved[2], saved[3], saved[4], ctx->saved_data["gram"].toBool(),
          ctx->saved_data["ill"].toBool(), ctx->saved_data["normaliser"].toOptional<double>(),
          ctx->saved_data["rank_rtol"].toDouble(), ctx->saved_data["cluster_rtol"].toDouble(),
          ctx->saved_data["full_rank"].toBool());
    };
    variable_list out(8);
    if (!grads[0].defined())
      return out;
    const Tensor moving = grads[0]._fw_grad(/*level=*/0);
    // A dual cotangent: the gradient is linear in it.
    out[0] = moving.defined()
                 ? at::_make_dual(gradient(grads[0]._fw_primal(0)), gradient(moving), /*level=*/0)
                 : gradient(grads[0]);
    return out;
  }
};

Outputs forward_autograd(
    const Tensor& x,
    bool gram,
    bool ill,
    std::optional<double> normaliser,
    std::optional<double> floor,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const auto out =
      Regularizer::apply(x, gram, ill, normaliser, floor, rank_rtol, cluster_rtol, full_rank);
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, Autograd, m) {
  m.impl("regularizer", &forward_autograd);
  m.impl("regularizer_backward", &backward_autograd);
}

}  // namespace immunize_ext
