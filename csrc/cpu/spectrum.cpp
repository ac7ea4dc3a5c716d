// Extremal singular values and extremes of Gram matrices on the CPU: forward and backward.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "spectrum_common.h"
#include "spectrum_engine.h"

namespace immunize_ext {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward extremal_singular_values(
    const Tensor& a,  // [*, n, p]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  check_floating_matrix("extremal_singular_values", "a", a);
  const int64_t n = a.size(-2), p = a.size(-1);
  const ExtremesBatch e = extremes_of(
      "extremal_singular_values", "a", a, std::min(n, p), {rank_rtol, cluster_rtol, full_rank},
      Wanted{}, /*of_gram=*/false);
  const auto shape = batch_shape(a);
  return {
      e.sigma_max.view(shape),
      e.sigma_min.view(shape),
      e.rank.view(shape),
      e.multiplicity_max.view(shape),
      e.multiplicity_min.view(shape),
      e.u_max.view(with_side(shape, n)),
      e.v_max.view(with_side(shape, p)),
      e.u_min.view(with_side(shape, n)),
      e.v_min.view(with_side(shape, p))};
}

Tensor extremal_singular_values_backward(
    const Tensor& grad_max,  // [*] float64
    const Tensor& grad_min,  // [*] float64
    const Tensor& a,         // [*, n, p]
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min,
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  Saved saved;
  saved.multiplicity_max = multiplicity_max;
  saved.multiplicity_min = multiplicity_min;
  saved.u_max = u_max;
  saved.v_max = v_max;
  saved.u_min = u_min;
  saved.v_min = v_min;
  return gradient_of(grad_max, grad_min, Tensor(), a, saved, {rank_rtol, cluster_rtol, full_rank});
}

using GramForward = std::
    tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

GramForward gram_extremes(
    const Tensor& x,  // [*, n, p]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  check_floating_matrix("gram_extremes", "x", x);
  const int64_t n = x.size(-2), p = x.size(-1), t = std::min(n, p);
  const ExtremesBatch e = extremes_of(
      "gram_extremes", "x", x, p, {rank_rtol, cluster_rtol, full_rank}, Wanted{}, /*of_gram=*/true);
  const auto shape = batch_shape(x);
  return {
      e.lambda_max.view(shape),
      e.lambda_min.view(shape),
      e.squared_frobenius.view(shape),
      e.rank.view(shape),
      e.multiplicity_max.view(shape),
      e.multiplicity_min.view(shape),
      e.u_max.view(with_side(shape, n)),
      e.v_max.view(with_side(shape, p)),
      e.u_min.view(with_side(shape, n)),
      e.v_min.view(with_side(shape, p)),
      e.thin_gram.view(with_side(with_side(shape, t), t))};
}

Tensor gram_extremes_backward(
    const Tensor& grad_max,
    const Tensor& grad_min,
    const Tensor& grad_squared_frobenius,
    const Tensor& x,  // [*, n, p]
    const Tensor& lambda_max,
    const Tensor& lambda_min,
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min,
    const Tensor& thin_gram,  // [*, t, t]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  Saved saved;
  saved.multiplicity_max = multiplicity_max;
  saved.multiplicity_min = multiplicity_min;
  saved.u_max = u_max;
  saved.v_max = v_max;
  saved.u_min = u_min;
  saved.v_min = v_min;
  saved.sigma_max = lambda_max.sqrt();
  saved.sigma_min = lambda_min.sqrt();
  saved.thin_gram = thin_gram;
  return gradient_of(
      grad_max, grad_min, grad_squared_frobenius, x, saved, {rank_rtol, cluster_rtol, full_rank});
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("extremal_singular_values", &extremal_singular_values);
  m.impl("extremal_singular_values_backward", &extremal_singular_values_backward);
  m.impl("gram_extremes", &gram_extremes);
  m.impl("gram_extremes_backward", &gram_extremes_backward);
}

}  // namespace immunize_ext
