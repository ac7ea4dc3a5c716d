// Derivatives of gram_regularizer in C++: at 64 x 784 the Python of a composition would cost more
// than the arithmetic. Device-independent.
//
// With the coefficients c of gram_regularizer.cpp the gradient is g c_i d lambda_i/dx, summed over
// i = max, min, F. For a cotangent Z of it, with d_i = <Z, d lambda_i/dx> and H = d c_i / d
// lambda_j,
//   d/dg = sum c_i d_i,
//   d/dx = g c_i (second derivative of lambda_i) Z + g (H d)_i d lambda_i/dx.
// H is 1 at (max, max) for R_well. For R_ill, with D_i = (0, -lambda_min, 1 / (2 k)), D_minmin =
// -1:
//   H_ij = 2 D_i D_j / D^3 - D_ij / D^2.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace immunize_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs call_forward(
    const Tensor& x,
    bool ill,
    std::optional<double> normaliser,
    std::optional<double> floor,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("immunize_ext::gram_regularizer", "")
                             .typed<Outputs(
                                 const Tensor&, bool, std::optional<double>, std::optional<double>,
                                 double, double, bool)>();
  return op.call(x, ill, normaliser, floor, rank_rtol, cluster_rtol, full_rank);
}

Tensor call_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& coefficients,
    const Tensor& multiplicity,
    const Tensor& thin_vector,
    const Tensor& thin_gram,
    bool ill,
    std::optional<double> normaliser,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("immunize_ext::gram_regularizer_backward", "")
          .typed<Tensor(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
              const Tensor&, bool, std::optional<double>, double, double, bool)>();
  return op.call(
      grad, x, coefficients, multiplicity, thin_vector, thin_gram, ill, normaliser, rank_rtol,
      cluster_rtol, full_rank);
}

using Eleven = std::
    tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// d/dg and d/dx of <cotangent, gradient of the regularizer>.
std::tuple<Tensor, Tensor> double_backward(
    const Tensor& cotangent,
    const Tensor& grad,
    const Tensor& x,
    const Tensor& coefficients,
    bool ill,
    std::optional<double> normaliser,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  auto& dispatcher = c10::Dispatcher::singleton();
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
  const auto [lambda_max, lambda_min, squared_frobenius, rank, m_max, m_min, u1, v1, uk, vk, gram] =
      extremes.call(x, rank_rtol, cluster_rtol, full_rank);
  const Tensor g = grad.to(at::kDouble);
  const Tensor c_max = coefficients.select(-1, 0), c_min = coefficients.select(-1, 1);
  const Tensor c_f = coefficients.select(-1, 2);
  auto [d_max, d_min, d_f, grad_x] =
      second.call(cotangent, g * c_max, g * c_min, g * c_f, x, rank_rtol, cluster_rtol, full_rank);
  const Tensor grad_g = (c_max * d_max + c_min * d_min + c_f * d_f).to(grad.scalar_type());
  Tensor h_max = at::zeros_like(g), h_min = h_max, h_f = h_max;
  if (ill) {
    // c_F = -1 / (2 k D^2) is 0 exactly where R_ill is held at its floor.
    const Tensor width =
        normaliser ? at::full_like(g, 2.0 * *normaliser) : 2.0 * rank.clamp_min(1).to(at::kDouble);
    const Tensor inverse_square = -c_f * width;               // 1 / D^2
    const Tensor twice_cube = 2.0 * inverse_square.pow(1.5);  // 2 / D^3
    const Tensor along = d_f / width - lambda_min * d_min;    // D_j d_j
    h_min = inverse_square * d_min - twice_cube * lambda_min * along;
    h_f = twice_cube * along / width;
  } else {
    h_max = d_max;
  }
  grad_x = grad_x + first.call(
                        g * h_max, g * h_min, g * h_f, x, lambda_max, lambda_min, m_max, m_min, u1,
                        v1, uk, vk, gram, rank_rtol, cluster_rtol, full_rank);
  return {grad_g, grad_x};
}

class GramRegularizerBackward : public Function<GramRegularizerBackward> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& grad,
      const Tensor& x,
      const Tensor& coefficients,
      const Tensor& multiplicity,
      const Tensor& thin_vector,
      const Tensor& thin_gram,
      bool ill,
      std::optional<double> normaliser,
      double rank_rtol,
      double cluster_rtol,
      bool full_rank) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad, x, coefficients});
    ctx->saved_data["ill"] = ill;
    ctx->saved_data["normaliser"] = normaliser;
    ctx->saved_data["rank_rtol"] = rank_rtol;
    ctx->saved_data["cluster_rtol"] = cluster_rtol;
    ctx->saved_data["full_rank"] = full_rank;
    return call_backward(
        grad, x, coefficients, multiplicity, thin_vector, thin_gram, ill, normaliser, rank_rtol,
        cluster_rtol, full_rank);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (at::GradMode::is_enabled())
      TORCH_CHECK_NOT_IMPLEMENTED(
          !grads[0].requires_grad() && !saved[0].requires_grad() && !saved[1].requires_grad(),
          "gram_r_well, gram_r_ill: third derivatives are not implemented");
    const auto [grad_g, grad_x] = double_backward(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["ill"].toBool(),
        ctx->saved_data["normaliser"].toOptional<double>(), ctx->saved_data["rank_rtol"].toDouble(),
        ctx->saved_data["cluster_rtol"].toDouble(), ctx->saved_data["full_rank"].toBool());
    variable_list out(11);
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
    const Tensor& thin_gram,
    bool ill,
    std::optional<double> normaliser,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  return GramRegularizerBackward::apply(
      grad, x, coefficients, multiplicity, thin_vector, thin_gram, ill, normaliser, rank_rtol,
      cluster_rtol, full_rank);
}

class GramRegularizer : public Function<GramRegularizer> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& x,
      bool ill,
      std::optional<double> normaliser,
      std::optional<double> floor,
      double rank_rtol,
      double cluster_rtol,
      bool full_rank) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, coefficients, multiplicity, thin_vector, thin_gram] =
        call_forward(x, ill, normaliser, floor, rank_rtol, cluster_rtol, full_rank);
    ctx->save_for_backward({x, coefficients, multiplicity, thin_vector, thin_gram});
    ctx->mark_non_differentiable({coefficients, multiplicity, thin_vector, thin_gram});
    ctx->saved_data["ill"] = ill;
    ctx->saved_data["normaliser"] = normaliser;
    ctx->saved_data["rank_rtol"] = rank_rtol;
    ctx->saved_data["cluster_rtol"] = cluster_rtol;
    ctx->saved_data["full_rank"] = full_rank;
    return {value, coefficients, multiplicity, thin_vector, thin_gram};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto gradient = [&](const Tensor& grad) {
      return call_backward(
          grad, saved[0], saved[1], saved[2], saved[3], saved[4], ctx->saved_data["ill"].toBool(),
          ctx->saved_data["normaliser"].toOptional<double>(),
          ctx->saved_data["rank_rtol"].toDouble(), ctx->saved_data["cluster_rtol"].toDouble(),
          ctx->saved_data["full_rank"].toBool());
    };
    variable_list out(7);
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
    bool ill,
    std::optional<double> normaliser,
    std::optional<double> floor,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  const auto out =
      GramRegularizer::apply(x, ill, normaliser, floor, rank_rtol, cluster_rtol, full_rank);
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, Autograd, m) {
  m.impl("gram_regularizer", &forward_autograd);
  m.impl("gram_regularizer_backward", &backward_autograd);
}

}  // namespace immunize_ext
