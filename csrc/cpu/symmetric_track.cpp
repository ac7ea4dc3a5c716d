// Extremes of a symmetric matrix that changes slowly, warm-started and proven, on the CPU.
//
// A cold call reduces H_ref = Q T Q^T and keeps Q, T, and at each end the extreme and the
// eigenvalue next to it. A warm call for H
// 1. follows the last vectors with H_ref as preconditioner (symmetric_route.inl) until |H x - theta
// x|
//    is rounding: then some eigenvalue lies within that of theta;
// 2. proves that it is the extreme, and simple. With near = cluster tolerance + noise, either by
// Weyl:
//    no eigenvalue but one moved past next -/+ |H - H_ref|_F, so theta beyond that by more than
//    near is alone; or, where H went further, by a Cholesky factorisation: if
//      (theta - near) I - H + c x x^T    (top)        H - (theta + near) I + c x x^T    (bottom)
//    with c = 2 |H| is positive definite, every eigenvalue but the one of x lies beyond near.
// Where either fails the caller takes a cold call: crossings and clusters end there. So a warm call
// returns what a cold one would, to rounding, or nothing.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "spectrum_common.h"
#include "spectrum_kernels.h"
#include "symmetric_input.h"

namespace immunize_ext {
namespace {

using namespace spectrum;

// h / scale as an exactly symmetric, contiguous float64 matrix; scale 0: its own power of two.
Tensor load(const char* op, const Tensor& h, double& scale) {
  TORCH_CHECK_VALUE(h.dim() == 2, op, ": h must have shape [p, p], got ", h.sizes());
  const int64_t t = check_square(op, h);
  const Tensor flat = readable(h);
  const Tensor out = at::empty({t, t}, flat.options().dtype(at::kDouble));
  double* to = out.mutable_data_ptr<double>();
  const Loaded loaded = flat.scalar_type() == at::kDouble
                            ? load_symmetric(flat.const_data_ptr<double>(), t, t, to)
                            : load_symmetric(flat.const_data_ptr<float>(), t, t, to);
  check_loaded(op, h, loaded, 0);
  if (scale == 0.0)
    scale = loaded.scale;
  return loaded.scale == scale ? out : out.mul_(loaded.scale / scale);
}

constexpr int64_t kScale = 4;  // its place in ends

Reference view(const Tensor& reflectors, const Tensor& tridiagonal, const Tensor& ends) {
  const int64_t t = reflectors.size(0), ld = reflectors.size(1);
  double* rows = tridiagonal.mutable_data_ptr<double>();
  const double* x = ends.const_data_ptr<double>();
  return {
      t,
      ld,
      rows,
      rows + ld,
      rows + 2 * ld,
      reflectors.mutable_data_ptr<double>(),
      {x[0], x[2]},
      {x[1], x[3]}};
}

using Cold = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Cold symmetric_reference(const Tensor& h, double cluster_rtol) {
  constexpr const char* op = "symmetric_reference";
  double scale = 0.0;
  const Tensor matrix = load(op, h, scale);
  const auto options = matrix.options();
  const int64_t t = matrix.size(0), ld = padded(t);
  const Tensor values = at::zeros({2}, options), vectors = at::zeros({2, t}, options);
  const Tensor multiplicity = at::ones({2}, options.dtype(at::kLong));
  const Tensor reflectors = at::zeros({t, ld}, options);
  const Tensor tridiagonal = at::zeros({3, ld}, options);
  const Tensor ends = at::zeros({5}, options);
  if (t > 1) {
    Reference r = view(reflectors, tridiagonal, ends);
    std::vector<double> g(ld * ld);
    const double* from = matrix.const_data_ptr<double>();
    for (int64_t i = 0; i < t; ++i)
      std::copy(from + i * t, from + (i + 1) * t, g.data() + i * ld);
    SymmetricPair pair;
    pair.v_max = vectors.mutable_data_ptr<double>();
    pair.v_min = pair.v_max + t;
    TORCH_CHECK_LINALG(
        IMMUNIZE_EXT_SPECTRUM(make_reference(g.data(), r, cluster_rtol, Threads{}, pair)), op,
        ": the extremes of h did not reach the accuracy of their class");
    values.mutable_data_ptr<double>()[0] = pair.lambda_max;
    values.mutable_data_ptr<double>()[1] = pair.lambda_min;
    multiplicity.mutable_data_ptr<int64_t>()[0] = pair.multiplicity_max;
    multiplicity.mutable_data_ptr<int64_t>()[1] = pair.multiplicity_min;
    double* x = ends.mutable_data_ptr<double>();
    x[0] = r.lambda[0];
    x[1] = r.next[0];
    x[2] = r.lambda[1];
    x[3] = r.next[1];
  } else {
    values.copy_(matrix.view({1}).expand({2}));
    vectors.fill_(1.0);
  }
  ends.mutable_data_ptr<double>()[kScale] = scale;
  values.mul_(scale);
  return {values, multiplicity, vectors, matrix, reflectors, tridiagonal, ends};
}

// Positive definiteness of sign (theta I - h) - near I + c x x^T.
bool alone(const Tensor& h, const Tensor& x, double sign, double theta, double near, double c) {
  Tensor m = h * -sign;
  m.diagonal().add_(sign * theta - near);
  m.addr_(x, x, 1.0, c);
  const auto [factor, info] = at::linalg_cholesky_ex(m);
  return info.item<int>() == 0;
}

std::tuple<Tensor, Tensor, bool> symmetric_track(
    const Tensor& h,
    double cluster_rtol,
    const Tensor& vectors,
    const Tensor& matrix,
    const Tensor& reflectors,
    const Tensor& tridiagonal,
    const Tensor& ends) {
  double scale = ends.const_data_ptr<double>()[kScale];
  const Tensor current = load("symmetric_track", h, scale);
  const int64_t t = current.size(0);
  // Not a number until an extreme is proven.
  const Tensor values = at::full({2}, std::numeric_limits<double>::quiet_NaN(), current.options());
  const Tensor found = vectors.clone();
  TORCH_CHECK_VALUE(
      matrix.sizes() == current.sizes(), "symmetric_track: h must have the shape ", matrix.sizes(),
      " of the reference, got ", h.sizes());
  if (t < 2)
    return {values, found, false};
  const Reference r = view(reflectors, tridiagonal, ends);
  const double moved = at::linalg_vector_norm(current - matrix).item<double>();
  const double size =
      std::max(std::abs(r.lambda[0]), std::abs(r.lambda[1])) + moved;  // at least |h|_2
  const double near = cluster_rtol * size + noise_bound(t, size);
  const double* from = current.const_data_ptr<double>();
  for (int end = 0; end < 2; ++end) {
    double theta = 0.0;
    double* x = found.mutable_data_ptr<double>() + end * t;
    const double residual = IMMUNIZE_EXT_SPECTRUM(follow(from, r, end, size, Threads{}, x, theta));
    if (!std::isfinite(residual))
      return {values, found, false};
    const double sign = end == 0 ? 1.0 : -1.0;
    const bool by_weyl = sign * (theta - r.next[end]) - moved > near;
    if (!by_weyl && !alone(current, found[end], sign, theta, near, 2.0 * size))
      return {values, found, false};
    values.mutable_data_ptr<double>()[end] = theta * scale;
  }
  return {values, found, true};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("symmetric_reference", &symmetric_reference);
  m.impl("symmetric_track", &symmetric_track);
}

}  // namespace immunize_ext
