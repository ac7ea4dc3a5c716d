// Extremal singular values and extremes of Gram matrices: forward and backward. What is the same on
// every device stands here, checks of arguments above all.
//
// d sigma_i = u_i^T dA v_i for a simple singular value, so grad_A = g u_i v_i^T. At an extreme of
// multiplicity m any u_i v_i^T of the cluster is a subgradient, and which one depends on the basis
// that a solver happened to return; their mean does not, and is the element of least norm of the
// Clarke subdifferential. The forward keeps one pair (u, v) an extreme, which is all a simple
// extreme needs; the backward decomposes again only the matrices whose extreme is a cluster.
//
// K = x^T x: lambda_i = sigma_i(x)^2, d lambda_i = 2 sigma_i u_i^T dx v_i, and
// |K|_F^2 = |x x^T|_F^2 with d|K|_F^2/dx = 4 x K = 4 (x x^T) x. With A^T u_i = sigma_i v_i all of
// it is one product on the thin side, for n <= p
//   grad_x = (4 g_F x x^T + 2 g_max u_1 u_1^T + 2 g_min u_k u_k^T) x,
// and for p < n the same with v on the right.

#include "spectrum.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "tensors.h"

namespace immunize_ext {

MatrixBatch as_batch(const char* op, const char* name, const Tensor& a) {
  check_floating_matrix(op, name, a);
  const int64_t n = a.size(-2), p = a.size(-1), batch = a.numel() / (n * p);
  return {readable(a).view({batch, n, p}), batch, n, p};
}

namespace {

Tensor flat(
    const char* op, const char* name, const Tensor& t, const Tensor& a, at::IntArrayRef sides) {
  check_same_device(op, name, t, "the matrices", a);
  std::vector<int64_t> shape = batch_shape(a).vec(),
                       flattened{a.numel() / (a.size(-2) * a.size(-1))};
  shape.insert(shape.end(), sides.begin(), sides.end());
  flattened.insert(flattened.end(), sides.begin(), sides.end());
  check_shape(op, name, t, shape);
  const Tensor plain = t.contiguous();
  return plain.sizes() == at::IntArrayRef(flattened) ? plain : plain.view(flattened);
}

}  // namespace

Tensor saved_numbers(
    const char* op, const char* name, const Tensor& t, const Tensor& a, at::IntArrayRef sides) {
  check_dtype(op, name, t, at::kDouble);
  return flat(op, name, t, a, sides);
}

Tensor saved_counts(const char* op, const char* name, const Tensor& t, const Tensor& a) {
  check_dtype(op, name, t, at::kLong);
  return flat(op, name, t, a, {});
}

Tensor incoming_gradient(const char* op, const char* name, const Tensor& t, const Tensor& a) {
  check_real_floating(op, name, t);
  return converted(flat(op, name, t, a, {}), at::kDouble);
}

namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <const SpectrumEngine& engine>
Forward extremal_singular_values(
    const Tensor& a,  // [*, n, p]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "extremal_singular_values";
  const MatrixBatch m = as_batch(op, "a", a);
  const c10::OptionalDeviceGuard guard(a.device());
  const ExtremesBatch e = engine.extremes(
      op, "a", m, {rank_rtol, cluster_rtol, full_rank, m.thin()}, Wanted{}, /*of_gram=*/false);
  const auto shape = batch_shape(a);
  const SidedVectors v(e, m, shape);
  return {
      shaped(e.value_max, shape),
      shaped(e.value_min, shape),
      shaped(e.rank, shape),
      shaped(e.multiplicity_max, shape),
      shaped(e.multiplicity_min, shape),
      v.left_max,
      v.right_max,
      v.left_min,
      v.right_min};
}

// What both backward operators have in common.
GradientInputs inputs_of(
    const char* op,
    const Tensor& a,
    const MatrixBatch& m,
    const Tensor& grad_max,
    const Tensor& grad_min,
    const Tensor& multiplicity_max,
    const Tensor& multiplicity_min,
    const Tensor& u_max,
    const Tensor& v_max,
    const Tensor& u_min,
    const Tensor& v_min) {
  GradientInputs in;
  in.grad_max = incoming_gradient(op, "grad_max", grad_max, a);
  in.grad_min = incoming_gradient(op, "grad_min", grad_min, a);
  in.multiplicity_max = saved_counts(op, "multiplicity_max", multiplicity_max, a);
  in.multiplicity_min = saved_counts(op, "multiplicity_min", multiplicity_min, a);
  (m.wide() ? in.thin_max : in.long_max) = saved_numbers(op, "u_max", u_max, a, {m.n});
  (m.wide() ? in.long_max : in.thin_max) = saved_numbers(op, "v_max", v_max, a, {m.p});
  (m.wide() ? in.thin_min : in.long_min) = saved_numbers(op, "u_min", u_min, a, {m.n});
  (m.wide() ? in.long_min : in.thin_min) = saved_numbers(op, "v_min", v_min, a, {m.p});
  return in;
}

template <const SpectrumEngine& engine>
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
  constexpr const char* op = "extremal_singular_values_backward";
  const MatrixBatch m = as_batch(op, "a", a);
  const c10::OptionalDeviceGuard guard(a.device());
  const GradientInputs in = inputs_of(
      op, a, m, grad_max, grad_min, multiplicity_max, multiplicity_min, u_max, v_max, u_min, v_min);
  return engine.gradient(op, m, in, {rank_rtol, cluster_rtol, full_rank, m.thin()})
      .view(a.sizes())
      .to(a.scalar_type());
}

using GramForward = std::
    tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <const SpectrumEngine& engine>
GramForward gram_extremes(
    const Tensor& x,  // [*, n, p]
    double rank_rtol,
    double cluster_rtol,
    bool full_rank) {
  constexpr const char* op = "gram_extremes";
  const MatrixBatch m = as_batch(op, "x", x);
  const c10::OptionalDeviceGuard guard(x.device());
  const ExtremesBatch e = engine.extremes(
      op, "x", m, {rank_rtol, cluster_rtol, full_rank, m.p}, Wanted{}, /*of_gram=*/true);
  const auto shape = batch_shape(x);
  const SidedVectors v(e, m, shape);
  return {
      shaped(e.value_max, shape),
      shaped(e.value_min, shape),
      shaped(e.squared_frobenius, shape),
      shaped(e.rank, shape),
      shaped(e.multiplicity_max, shape),
      shaped(e.multiplicity_min, shape),
      v.left_max,
      v.right_max,
      v.left_min,
      v.right_min,
      shaped(e.thin_gram, with_sides(shape, {m.thin(), m.thin()}))};
}

template <const SpectrumEngine& engine>
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
  constexpr const char* op = "gram_extremes_backward";
  const MatrixBatch m = as_batch(op, "x", x);
  const c10::OptionalDeviceGuard guard(x.device());
  GradientInputs in = inputs_of(
      op, x, m, grad_max, grad_min, multiplicity_max, multiplicity_min, u_max, v_max, u_min, v_min);
  in.grad_squared_frobenius =
      incoming_gradient(op, "grad_squared_frobenius", grad_squared_frobenius, x);
  in.lambda_max = saved_numbers(op, "lambda_max", lambda_max, x);
  in.lambda_min = saved_numbers(op, "lambda_min", lambda_min, x);
  in.thin_gram = saved_numbers(op, "thin_gram", thin_gram, x, {m.thin(), m.thin()});
  return engine.gradient(op, m, in, {rank_rtol, cluster_rtol, full_rank, m.p})
      .view(x.sizes())
      .to(x.scalar_type());
}

template <const SpectrumEngine& engine>
void register_operators(torch::Library& m) {
  m.impl("extremal_singular_values", &extremal_singular_values<engine>);
  m.impl("extremal_singular_values_backward", &extremal_singular_values_backward<engine>);
  m.impl("gram_extremes", &gram_extremes<engine>);
  m.impl("gram_extremes_backward", &gram_extremes_backward<engine>);
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  register_operators<cpu_spectrum>(m);
}

#ifdef IMMUNIZE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(immunize_ext, CUDA, m) {
  register_operators<cuda_spectrum>(m);
}
#endif

}  // namespace immunize_ext
