// Traces and energies of resolvents B = (A + k I)^-1 of a symmetric A, for many shifts k at once:
//
//   first = tr A B,   second = tr A^2 B^2,   energies = b^T B^2 b.
//
// A B = I - k B, so that with f = g_first and so on
//   grad_A = k (f + 2 h) B^2 - 2 h k^2 B^3 - g (B b b^T B^2 + B^2 b b^T B),   h = g_second,
//   grad_k = -f (tr B - k tr B^2) - 2 h (tr B - 2 k tr B^2 + k^2 tr B^3) - 2 g b^T B^3 b,
//   grad_b = 2 g B^2 b.
// Nothing divides by gaps of eigenvalues: these are smooth wherever A + k I is positive definite.
// Where the backward pass shall be differentiated again it is a composition (ops/resolvent.py).
//
// A and the shifts are divided by a power of two, so that no square overflows.

#include "resolvent.h"

#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "checks.h"
#include "symmetric.h"
#include "tensors.h"

namespace immunize_ext {
namespace {

using Values = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Problem {
  Tensor shifts, vectors;  // flat over the batch, float64
  Tensor scale;            // [batch, 1]
};

Problem problem_of(const char* op, const Tensor& a, const Tensor& shifts, const Tensor& vectors) {
  check_floating_matrix(op, "a", a);
  IMMUNIZE_CHECK(a.size(-1) == a.size(-2), op, "a", "have shape [*, p, p]", a.sizes());
  check_real_floating(op, "shifts", shifts);
  check_same_device(op, "shifts", shifts, "a", a);
  IMMUNIZE_CHECK(
      shifts.dim() == a.dim() - 1 && shifts.sizes().slice(0, a.dim() - 2) == batch_shape(a), op,
      "shifts", "have shape [*, s], * that of a", shifts.sizes());
  check_real_floating(op, "vectors", vectors);
  check_same_device(op, "vectors", vectors, "a", a);
  check_matrix(op, "vectors", vectors, a.size(-1));
  check_batch(op, "vectors", vectors, batch_shape(a));
  const int64_t p = a.size(-1), batch = a.numel() / (p * p);
  const Tensor k = shifts.to(at::kDouble).reshape({batch, shifts.size(-1)}).contiguous();
  Tensor largest = a.to(at::kDouble).abs().reshape({batch, p * p}).amax(1, /*keepdim=*/true);
  if (k.size(1) > 0)
    largest = at::maximum(largest, k.abs().amax(1, /*keepdim=*/true));
  return {
      k, vectors.to(at::kDouble).reshape({batch, p, vectors.size(-1)}).contiguous(),
      power_of_two_scale(largest)};
}

// a / scale, exactly symmetric.
Tensor symmetric_part(const char* op, const Tensor& a, const Tensor& scale) {
  const int64_t p = a.size(-1);
  const Tensor wide = a.to(at::kDouble).reshape({-1, p, p}), mirrored = wide.mT();
  const Tensor found = wide.abs().amax({1, 2}).contiguous(),
               differs = (wide - mirrored).abs().amax({1, 2}).contiguous();
  const double allowed = allowed_asymmetry(a);
  for (int64_t b = 0; b < wide.size(0); ++b) {
    const double largest = found.const_data_ptr<double>()[b];
    check_finite(op, "a", largest, b);
    const double difference = differs.const_data_ptr<double>()[b];
    IMMUNIZE_CHECK(
        difference <= allowed * largest, op, "a", "be symmetric", "entries that differ by ",
        difference, " from their mirror image in matrix ", b,
        " of the batch; pass (a + a.mT) / 2 if the difference has no meaning");
  }
  const Tensor unit = wide / scale.unsqueeze(-1);
  return (unit * 0.5 + unit.mT() * 0.5).contiguous();
}

void check_numbers(const char* op, const char* argument, const Tensor& values) {
  if (values.numel() > 0)
    check_finite(op, argument, values.abs().max().item<double>());
}

Values resolvent_traces(
    const Tensor& a,          // [*, p, p]
    const Tensor& shifts,     // [*, s]
    const Tensor& vectors) {  // [*, p, m]
  constexpr const char* op = "resolvent_traces";
  const Problem given = problem_of(op, a, shifts, vectors);
  const Tensor unit = symmetric_part(op, a, given.scale);
  check_numbers(op, "shifts", given.shifts);
  check_numbers(op, "vectors", given.vectors);
  const TridiagonalForm form = cpu_tridiagonal_form(unit);
  const Tensor scaled = (given.shifts / given.scale).contiguous();
  const Tensor definite = at::ones(scaled.sizes(), scaled.options().dtype(at::kLong));
  const ResolventValues x = cpu_resolvent_values(form, scaled, given.vectors, definite);
  for (int64_t i = 0; i < definite.numel(); ++i)
    IMMUNIZE_CHECK(
        definite.const_data_ptr<int64_t>()[i] != 0, op, "shifts",
        "make a + shift I positive definite", given.shifts.const_data_ptr<double>()[i],
        " for matrix ", i / scaled.size(1), " of the batch; take a larger shift");
  const auto shape = batch_shape(a);
  const int64_t p = a.size(-1), s = shifts.size(-1), m = vectors.size(-1);
  const Tensor width = given.scale.unsqueeze(-1);
  return {
      x.first.view(with_sides(shape, {s})),
      x.second.view(with_sides(shape, {s})),
      (x.energies / width / width).view(with_sides(shape, {s, m})),
      (form.diagonal * given.scale).view(with_sides(shape, {p})),
      (form.offdiagonal * given.scale).view(with_sides(shape, {p})),
      form.basis.view(with_sides(shape, {p, p}))};
}

std::tuple<Tensor, Tensor, Tensor> resolvent_traces_backward(
    const Tensor& grad_first,     // [*, s] float64
    const Tensor& grad_second,    // [*, s] float64
    const Tensor& grad_energies,  // [*, s, m] float64
    const Tensor& a,              // [*, p, p]
    const Tensor& shifts,         // [*, s]
    const Tensor& vectors,        // [*, p, m]
    const Tensor& diagonal,       // [*, p] float64
    const Tensor& offdiagonal,    // [*, p] float64
    const Tensor& basis) {        // [*, p, p] float64
  constexpr const char* op = "resolvent_traces_backward";
  const Problem given = problem_of(op, a, shifts, vectors);
  const auto shape = batch_shape(a);
  const int64_t p = a.size(-1), s = shifts.size(-1), m = vectors.size(-1);
  const int64_t batch = given.shifts.size(0);
  const auto flat = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> sides) {
    check_dtype(op, name, t, at::kDouble);
    check_same_device(op, name, t, "a", a);
    check_shape(op, name, t, with_sides(shape, sides));
    return t.reshape(with_sides({batch}, sides)).contiguous();
  };
  const Tensor width = given.scale.unsqueeze(-1);
  const ResolventValues grad{
      flat("grad_first", grad_first, {s}), flat("grad_second", grad_second, {s}),
      (flat("grad_energies", grad_energies, {s, m}) / width / width).contiguous()};
  const TridiagonalForm form{
      (flat("diagonal", diagonal, {p}) / given.scale).contiguous(),
      (flat("offdiagonal", offdiagonal, {p}) / given.scale).contiguous(),
      flat("basis", basis, {p, p})};
  const Tensor scaled = (given.shifts / given.scale).contiguous();
  const ResolventGradient x = cpu_resolvent_gradient(grad, form, scaled, given.vectors);
  const Tensor of_vectors = at::empty(vectors.sizes(), vectors.options());
  of_vectors.view({batch, p, m}).copy_(x.vectors);
  return {
      (x.matrix / width).view(a.sizes()).to(a.scalar_type()),
      (x.shifts / given.scale).view(shifts.sizes()).to(shifts.scalar_type()), of_vectors};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("resolvent_traces", &resolvent_traces);
  m.impl("resolvent_traces_backward", &resolvent_traces_backward);
}

}  // namespace immunize_ext
