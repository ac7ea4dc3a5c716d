// Inner products of the gradients that samples have in one linear layer, without these gradients.
//
// Sample i sends tokens a_it into the layer and gets output gradients g_it back; its gradient in the
// weight is J_i = sum_t g_it a_it^T, and with b = 1 for a layer with a bias, 0 without,
//
//   K_ij = <J_i, J_j> = sum_ts (a_it . a_js + b) (g_it . g_js).
//
// So K is a sum over pairs of tokens of an entrywise product of two symmetric products: the Gram
// matrix of a Khatri-Rao product. With H = grad + grad^T and H~ its copy for pairs of tokens,
//
//   grad_A = (H~ o G G^T) A,   grad_G = (H~ o (A A^T + b)) G,
//
// or, where J_i has fewer numbers than a pair of samples costs, with dJ = H J:
//
//   grad_a_it = dJ_i^T g_it,   grad_g_it = dJ_i a_it.
//
// K has degree two in a and in g and is differentiable everywhere. Where the backward pass shall be
// differentiated again it is a composition (ops/khatri_rao_fallback.py).

#include "khatri_rao.h"

#include <torch/library.h>

#include "checks.h"
#include "tensors.h"

namespace immunize_ext {
namespace {

// Both as [batch, n, t, sides].
std::tuple<Tensor, Tensor> samples_of(const char* op, const Tensor& a, const Tensor& g) {
  for (const auto& [name, x] : {std::pair{"activations", a}, std::pair{"gradients", g}}) {
    check_real_floating(op, name, x);
    IMMUNIZE_CHECK(
        x.dim() >= 3 && x.size(-1) > 0 && x.size(-2) > 0 && x.size(-3) > 0, op, name,
        "have shape [*, n, t, d], no side 0", x.sizes());
  }
  check_same_device(op, "gradients", g, "activations", a);
  IMMUNIZE_CHECK(
      g.dim() == a.dim() && g.sizes().slice(0, a.dim() - 1) == a.sizes().slice(0, a.dim() - 1), op,
      "gradients", "have the samples and tokens of activations", g.sizes());
  const int64_t n = a.size(-3), t = a.size(-2);
  const int64_t batch = a.numel() / (n * t * a.size(-1));
  return {readable(a).view({batch, n, t, a.size(-1)}), readable(g).view({batch, n, t, g.size(-1)})};
}

std::vector<int64_t> pairs_shape(const Tensor& a) {
  const int64_t n = a.size(-3);
  return with_sides(a.sizes().slice(0, a.dim() - 3), {n, n});
}

Tensor khatri_rao_gram(
    const Tensor& activations,  // [*, n, t, d]
    const Tensor& gradients,    // [*, n, t, o]
    bool bias) {
  constexpr const char* op = "khatri_rao_gram";
  const auto [a, g] = samples_of(op, activations, gradients);
  const Tensor k = cpu_khatri_rao_gram(a, g, bias);
  // What is not finite in a sample is not in its own entry.
  const Tensor own = k.diagonal(0, 1, 2).sum(1).contiguous();
  for (int64_t b = 0; b < own.numel(); ++b) {
    if (std::isfinite(own.const_data_ptr<double>()[b]))
      continue;
    check_finite(op, "activations", a[b].abs().max().item<double>(), b);
    check_finite(op, "gradients", g[b].abs().max().item<double>(), b);
    IMMUNIZE_CHECK(
        false, op, "activations and gradients", "have products below 1e308",
        "an overflow in matrix ", b, " of the batch; scale them");
  }
  return k.view(pairs_shape(activations));
}

std::tuple<Tensor, Tensor> khatri_rao_gram_backward(
    const Tensor& grad,         // [*, n, n] float64
    const Tensor& activations,  // [*, n, t, d]
    const Tensor& gradients,    // [*, n, t, o]
    bool bias,
    bool need_activations,
    bool need_gradients) {
  constexpr const char* op = "khatri_rao_gram_backward";
  const auto [a, g] = samples_of(op, activations, gradients);
  check_dtype(op, "grad", grad, at::kDouble);
  check_same_device(op, "grad", grad, "activations", activations);
  check_shape(op, "grad", grad, pairs_shape(activations));
  const Tensor flat = grad.reshape({a.size(0), a.size(1), a.size(1)});
  const auto [of_a, of_g] = cpu_khatri_rao_gradient(
      (flat + flat.mT()).contiguous(), a, g, bias, need_activations, need_gradients);
  const auto like = [](const Tensor& found, const Tensor& given, bool needed) {
    return needed ? found.view(given.sizes()).to(given.scalar_type())
                  : at::empty({0}, given.options());
  };
  return {like(of_a, activations, need_activations), like(of_g, gradients, need_gradients)};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("khatri_rao_gram", &khatri_rao_gram);
  m.impl("khatri_rao_gram_backward", &khatri_rao_gram_backward);
}

}  // namespace immunize_ext
