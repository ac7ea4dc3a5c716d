// symmetric_extremes for plain tensors: values in the dtype of the matrix, and a derivative that
// passes through no Python, which for one 8 x 8 matrix would cost several times the arithmetic.
// Where the gradient shall be differentiated again, by reverse or forward mode or under vmap, it is
// that of the operator symmetric_extremes_backward, with its rule.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "plain_gradient.h"
#include "tensors.h"

namespace immunize_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs symmetric_pair(const Tensor& h, double cluster_rtol) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("immunize_ext::symmetric_extremes", "")
                             .typed<Outputs(const Tensor&, double)>();
  auto [largest, smallest, m_max, m_min, v_max, v_min] = op.call(h, cluster_rtol);
  const at::ScalarType dtype = h.scalar_type();
  return {converted(largest, dtype), converted(smallest, dtype), m_max, m_min, v_max, v_min};
}

class SymmetricPair : public torch::autograd::Function<SymmetricPair> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& h, double cluster_rtol) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("immunize_ext::symmetric_pair", "")
                               .typed<Outputs(const Tensor&, double)>();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [largest, smallest, m_max, m_min, v_max, v_min] = op.call(h, cluster_rtol);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({h, m_max, m_min, v_max, v_min});
    ctx->mark_non_differentiable({m_max, m_min, v_max, v_min});
    ctx->saved_data["cluster_rtol"] = cluster_rtol;
    return {largest, smallest, m_max, m_min, v_max, v_min};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined() && !grads[1].defined())
      return {Tensor(), Tensor()};
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("immunize_ext::symmetric_extremes_backward", "")
                               .typed<Tensor(
                                   const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const Tensor&, const Tensor&, double)>();
    const auto saved = ctx->get_saved_variables();
    const auto given = [&grads](int end) {
      return grads[end].defined() ? grads[end] : at::zeros_like(grads[1 - end]);
    };
    const auto gradient = [&] {
      return op.call(
          given(0), given(1), saved[0], saved[1], saved[2], saved[3], saved[4],
          ctx->saved_data["cluster_rtol"].toDouble());
    };
    if (!wants_numbers_only(grads))
      return {gradient(), Tensor()};
    at::AutoDispatchBelowADInplaceOrView below;
    return {gradient(), Tensor()};
  }
};

Outputs forward_autograd(const Tensor& h, double cluster_rtol) {
  const auto out = SymmetricPair::apply(h, cluster_rtol);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("symmetric_pair", &symmetric_pair);
}

TORCH_LIBRARY_IMPL(immunize_ext, Autograd, m) {
  m.impl("symmetric_pair", &forward_autograd);
}

}  // namespace immunize_ext
