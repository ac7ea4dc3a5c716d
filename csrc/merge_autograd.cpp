// A merge recorded in C++, the part per layer and B: to pack lists of weights for a function of
// autograd in Python takes longer than a GPU needs to merge them. Device-independent.
//
// What is here is the first derivative in reverse mode. Derivatives of the derivative, forward mode
// and transforms of torch.func are those of ops/merge_derivatives.py and ops/merge_saddle.py, which
// have the mathematics.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "plain_gradient.h"
#include "rules.h"

namespace immunize_ext {
namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Merged = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor>;
using Gradients = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor>;

const auto& merge_apply() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("immunize_ext::merge_apply", "")
          .typed<Merged(TensorList, TensorList, IntArrayRef, bool, const Tensor&, const Tensor&)>();
  return op;
}

const auto& merge_apply_backward() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("immunize_ext::merge_apply_backward", "")
          .typed<Gradients(
              TensorList, TensorList, TensorList, IntArrayRef, bool, const Tensor&, const Tensor&,
              TensorList, bool, bool, bool, bool)>();
  return op;
}

// Inputs are c, b, base and targets, outputs the merged weights. Residuals and the status, which have
// no derivative, leave by `found`: as outputs they would be recorded first and excepted then.
class MergeApply : public torch::autograd::Function<MergeApply> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& c,
      const Tensor& b,
      TensorList base,
      TensorList targets,
      IntArrayRef rows,
      bool targets_are_values,
      Merged* found) {
    at::AutoDispatchBelowADInplaceOrView below;
    *found = merge_apply().call(base, targets, rows, targets_are_values, c, b);
    const auto& [merged, residual, status] = *found;
    variable_list saved{c, b};
    for (const TensorList list : {base, targets, TensorList(residual)})
      saved.insert(saved.end(), list.begin(), list.end());
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["targets"] = static_cast<int64_t>(targets.size());
    ctx->saved_data["rows"] = rows.vec();
    ctx->saved_data["targets_are_values"] = targets_are_values;
    return merged;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const size_t layers = grads.size(), targets = ctx->saved_data["targets"].toInt();
    const size_t first_target = 2 + layers, end = first_target + targets;
    variable_list out(end + 3);  // rows, targets_are_values and found have no gradient
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); }))
      return out;
    const variable_list saved = ctx->get_saved_variables();
    const TensorList all(saved), base = all.slice(2, layers);
    // A layer that the loss does not depend on has no gradient.
    variable_list incoming = grads;
    for (size_t layer = 0; layer < layers; ++layer)
      if (!incoming[layer].defined())
        incoming[layer] = at::zeros_like(base[layer]);
    const bool need_base = ctx->needs_input_grad({{2, first_target}});
    const bool need_targets = ctx->needs_input_grad({{first_target, end}});
    const bool need_c = ctx->needs_input_grad(0), need_b = ctx->needs_input_grad(1);
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (wants_numbers_only(grads))
      below.emplace();
    auto [of_base, of_targets, of_c, of_b] = merge_apply_backward().call(
        incoming, base, all.slice(first_target, targets), ctx->saved_data["rows"].toIntVector(),
        ctx->saved_data["targets_are_values"].toBool(), saved[0], saved[1], all.slice(end, layers),
        need_base, need_targets, need_c, need_b);
    if (need_c)
      out[0] = std::move(of_c);
    if (need_b)
      out[1] = std::move(of_b);
    std::move(of_base.begin(), of_base.end(), out.begin() + 2);
    std::move(of_targets.begin(), of_targets.end(), out.begin() + first_target);
    return out;
  }
};

// Who serves a call.
enum class Way { below, recorded, rules };

Way way_of(std::initializer_list<TensorList> arguments) {
  const auto any_of = [&](auto asked) {
    return std::any_of(arguments.begin(), arguments.end(), [&](TensorList list) {
      return std::any_of(list.begin(), list.end(), asked);
    });
  };
  if (any_of(carries_tangent))
    return Way::rules;
  if (!any_of(is_recorded))
    return Way::below;
  return is_transformed() ? Way::rules : Way::recorded;
}

Merged merge_apply_recorded(
    TensorList base,
    TensorList targets,
    IntArrayRef rows,
    bool targets_are_values,
    const Tensor& c,
    const Tensor& b) {
  const Way way = way_of({c, b, base, targets});
  if (way == Way::rules)
    return merge_apply().redispatch(kRules, base, targets, rows, targets_are_values, c, b);
  if (way == Way::below) {
    at::AutoDispatchBelowAutograd below;
    return merge_apply().call(base, targets, rows, targets_are_values, c, b);
  }
  Merged found;
  std::get<0>(found) = MergeApply::apply(c, b, base, targets, rows, targets_are_values, &found);
  return found;
}

// --- B --------------------------------------------------------------------------------------------

template <typename Result, typename... First>
auto saddle_operator(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<Result(
          First..., const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
          const Tensor&, const Tensor&, const Tensor&)>();
}

const auto& merge_constraint_map() {
  static const auto op = saddle_operator<Tensor>("immunize_ext::merge_constraint_map");
  return op;
}

// B, given B. Of its cotangent G, with U = G S,
//   dC = E U - B G^T B,  d(1 / mu)_i = -(E G B^T)_ii,  dQ = -B^T U,
// and dC_reg = C_reg (dQ + dQ^T), never by way of a d x d matrix. All of it are operators with
// derivatives of their own, so this serves every order. Forward mode and torch.func go to the same
// formulas in Python (ops/merge_saddle.py).
class ConstraintMap : public torch::autograd::Function<ConstraintMap> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& c,
      const Tensor& inverse_hardness,
      const Tensor& source,
      const Tensor& ridge,
      const Tensor& chol,
      const Tensor& root,
      const Tensor& basis,
      const Tensor& b) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor out =
        merge_constraint_map().call(c, inverse_hardness, source, ridge, chol, root, basis, b);
    ctx->save_for_backward({c, inverse_hardness, source, ridge, chol, root, basis, out});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto free_solve =
        saddle_operator<Tensor, const Tensor&>("immunize_ext::merge_free_solve");
    static const auto constraint_solve =
        saddle_operator<Tensor, const Tensor&>("immunize_ext::merge_constraint_solve");
    const variable_list saddle = ctx->get_saved_variables();
    const auto with_saddle = [&](const auto& op, const Tensor& x) {
      return op.call(
          x, saddle[0], saddle[1], saddle[2], saddle[3], saddle[4], saddle[5], saddle[6],
          saddle[7]);
    };
    const Tensor &g = grads[0], &source = saddle[2], &b = saddle[7];
    const bool need_c = ctx->needs_input_grad(0), need_source = ctx->needs_input_grad(2);
    const bool need_ridge = ctx->needs_input_grad(3);
    variable_list out(8);
    if (ctx->needs_input_grad(1))
      out[1] = -(with_saddle(constraint_solve, g) * b).sum(-1);
    if (!need_c && !need_source && !need_ridge)
      return out;
    const Tensor u = with_saddle(free_solve, g.mT()).mT();
    if (need_c)
      out[0] = with_saddle(constraint_solve, u) - b.matmul(g.mT()).matmul(b);
    if (need_source) {
      const Tensor wide = source.to(at::kDouble);
      const Tensor moved = wide.matmul(b.mT()).matmul(u) + wide.matmul(u.mT()).matmul(b);
      out[2] = (-moved).to(source.scalar_type());
    }
    if (need_ridge)
      out[3] = -(b * u).sum({-2, -1});
    return out;
  }
};

Tensor merge_constraint_map_recorded(
    const Tensor& c,
    const Tensor& inverse_hardness,
    const Tensor& source,
    const Tensor& ridge,
    const Tensor& chol,
    const Tensor& root,
    const Tensor& basis,
    const Tensor& b) {
  const auto& op = merge_constraint_map();
  switch (way_of({c, inverse_hardness, source, ridge, chol, root, basis, b})) {
    case Way::rules:
      return op.redispatch(kRules, c, inverse_hardness, source, ridge, chol, root, basis, b);
    case Way::recorded:
      return ConstraintMap::apply(c, inverse_hardness, source, ridge, chol, root, basis, b);
    case Way::below:
      break;
  }
  at::AutoDispatchBelowAutograd below;
  return op.call(c, inverse_hardness, source, ridge, chol, root, basis, b);
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, AutogradCPU, m) {
  m.impl("merge_apply", &merge_apply_recorded);
  m.impl("merge_constraint_map", &merge_constraint_map_recorded);
}

TORCH_LIBRARY_IMPL(immunize_ext, AutogradCUDA, m) {
  m.impl("merge_apply", &merge_apply_recorded);
  m.impl("merge_constraint_map", &merge_constraint_map_recorded);
}

}  // namespace immunize_ext
