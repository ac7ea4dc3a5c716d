// Algebraic extremes of symmetric matrices on the CPU, many tiny ones at once (lanes.h) or reduced
// (symmetric_route.inl), and along a trajectory: warm-started and proven.
//
// A trajectory. A cold call reduces H_ref = Q T Q^T and keeps Q, T, and at each end the extreme and
// the eigenvalue next to it. A warm call for H
// 1. follows the last vectors with H_ref as preconditioner (symmetric_route.inl) until
//    |H x - theta x| is rounding: then some eigenvalue lies within that of theta;
// 2. proves that it is the extreme, and simple. With near = cluster tolerance + noise, either by
//    Weyl: no eigenvalue but one moved past next -/+ |H - H_ref|_F, so theta beyond that by more
//    than near is alone; or, where H went further, by a Cholesky factorisation: if
//      (theta - near) I - H + c x x^T    (top)        H - (theta + near) I + c x x^T    (bottom)
//    with c = 2 |H| is positive definite, every eigenvalue but the one of x lies beyond near.
// Where either fails the caller takes a cold call: crossings and clusters end there. So a warm call
// returns what a cold one would, to rounding, or nothing.

#include "../symmetric.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../tensors.h"
#include "full_decomposition.h"
#include "lanes.h"
#include "spectrum_kernels.h"

namespace immunize_ext {
namespace {

using namespace spectrum;

// h (t x t) as the padded, scaled, exactly symmetric g. Asymmetry beyond rounding is an error.
struct Loaded {
  double scale = 1.0;
  bool finite = true;
  double largest = 0.0, asymmetry = 0.0;
};

template <typename T>
Loaded load_symmetric(const T* h, int64_t t, int64_t ld, double* g) {
  constexpr int64_t block = 16;
  const int64_t blocks = (t + block - 1) / block;
  Loaded found;
  std::vector<double> of_block(blocks, 0.0);
  const auto largest_of = [&of_block] {
    double largest = 0.0;
    for (const double x : of_block) {
      if (std::isnan(x))
        return x;
      largest = std::max(largest, x);
    }
    return largest;
  };
  const int64_t grain = std::max<int64_t>(1, 50000 / (block * t));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* from = h + b * block * t;
      const int64_t count = (std::min((b + 1) * block, t) - b * block) * t;
      T lanes[8] = {}, sum[8] = {};
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
        for (int s = 0; s < 8; ++s) {
          const T x = std::abs(from[i + s]);
          lanes[s] = x > lanes[s] ? x : lanes[s];
          sum[s] += x * T(0);  // NaN for NaN and infinity alike
        }
      }
      for (; i < count; ++i) {
        lanes[0] = std::max(lanes[0], std::abs(from[i]));
        sum[0] += std::abs(from[i]) * T(0);
      }
      double largest = 0.0;
      for (int s = 0; s < 8; ++s)
        largest = std::max(largest, static_cast<double>(lanes[s])) + static_cast<double>(sum[s]);
      of_block[b] = largest;
    }
  });
  found.largest = largest_of();
  found.finite = std::isfinite(found.largest);
  if (!found.finite)
    return found;
  found.scale = power_of_two_scale(found.largest);
  // Two factors, since the inverse of a subnormal scale would overflow; both are exact.
  const double inverse = found.scale < 0x1p-1000 ? 0x1p1000 : 1.0 / found.scale;
  const double rest = found.scale < 0x1p-1000 ? 0x1p-1000 / found.scale : 1.0;
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double asymmetry = 0.0;
      for (int64_t j0 = 0; j0 < t; j0 += block) {
        for (int64_t i = b * block; i < std::min((b + 1) * block, t); ++i) {
          for (int64_t j = j0; j < std::min(j0 + block, t); ++j) {
            const double here = static_cast<double>(h[i * t + j]) * inverse * rest;
            const double mirrored = static_cast<double>(h[j * t + i]) * inverse * rest;
            asymmetry = std::max(asymmetry, std::abs(here - mirrored));
            g[i * ld + j] = 0.5 * here + 0.5 * mirrored;  // the same at (j, i): a + b = b + a
          }
        }
      }
      of_block[b] = asymmetry;
    }
  });
  found.asymmetry = largest_of() * found.scale;
  return found;
}

Loaded load_symmetric(const Tensor& flat, int64_t b, int64_t ld, double* g) {
  const int64_t t = flat.size(-1);
  return flat.scalar_type() == at::kDouble
             ? load_symmetric(flat.const_data_ptr<double>() + b * t * t, t, ld, g)
             : load_symmetric(flat.const_data_ptr<float>() + b * t * t, t, ld, g);
}

// What load_symmetric found must be finite and symmetric up to rounding.
void check_loaded(const char* op, double allowed, const Loaded& loaded, int64_t b) {
  if (!loaded.finite)
    refuse_infinite(op, b);
  if (!(loaded.asymmetry <= allowed * loaded.largest))
    refuse_asymmetric(op, loaded.asymmetry, b);
}

// Writes what the lanes settle, and returns the matrices that are left.
template <typename T>
std::vector<int64_t> left_by_lanes(
    const Tensor& h, double allowed, double cluster_rtol, const SymmetricBatch& out) {
  const int64_t t = h.size(-1), batch = h.size(0);
  std::vector<char> settled(batch, 0);
  if (lanes::serves(t, t)) {
    const lanes::SymmetricBatch<T> all{
        h.const_data_ptr<T>(),
        t,
        allowed,
        cluster_rtol,
        out.lambda_max.mutable_data_ptr<double>(),
        out.lambda_min.mutable_data_ptr<double>(),
        out.multiplicity_max.mutable_data_ptr<int64_t>(),
        out.multiplicity_min.mutable_data_ptr<int64_t>(),
        out.v_max.mutable_data_ptr<double>(),
        out.v_min.mutable_data_ptr<double>(),
        settled.data()};
    for_each_lanes(
        batch, t * t * t, [&](int64_t begin, int64_t end) { lanes::extremes(all, begin, end); });
  }
  std::vector<int64_t> left;
  for (int64_t b = 0; b < batch; ++b)
    if (!settled[b])
      left.push_back(b);
  return left;
}

SymmetricBatch extremes_of(const char* op, const Tensor& h, double allowed, double cluster_rtol) {
  const Call call;
  const int64_t t = h.size(-1), ld = padded(t), batch = h.size(0);
  const auto options = h.options().dtype(at::kDouble);
  const SymmetricBatch out{
      at::empty({batch}, options),
      at::empty({batch}, options),
      at::empty({batch}, options.dtype(at::kLong)),
      at::empty({batch}, options.dtype(at::kLong)),
      at::empty({batch, t}, options),
      at::empty({batch, t}, options)};
  const std::vector<int64_t> left = h.scalar_type() == at::kDouble
                                        ? left_by_lanes<double>(h, allowed, cluster_rtol, out)
                                        : left_by_lanes<float>(h, allowed, cluster_rtol, out);
  const int64_t count = static_cast<int64_t>(left.size());
  std::vector<Loaded> loaded(count);
  std::vector<SymmetricPair> pairs(count);
  std::vector<char> settled(count, 0);
  for_each_matrix(count, t * t * t, [&](int64_t index) {
    const int64_t b = left[index];
    std::vector<double> g(ld * ld);
    loaded[index] = load_symmetric(h, b, ld, g.data());
    if (!loaded[index].finite)
      return;
    SymmetricPair& pair = pairs[index];
    pair.v_max = out.v_max.mutable_data_ptr<double>() + b * t;
    pair.v_min = out.v_min.mutable_data_ptr<double>() + b * t;
    std::fill(pair.v_max, pair.v_max + t, 0.0);
    std::fill(pair.v_min, pair.v_min + t, 0.0);
    if (loaded[index].largest == 0.0) {
      // The zero matrix: one cluster, whose mean gradient is I / p.
      pair.multiplicity_max = pair.multiplicity_min = t;
      pair.v_max[t - 1] = pair.v_min[0] = 1.0;
      settled[index] = 1;
      return;
    }
    Workspace work(t, t);
    settled[index] =
        IMMUNIZE_EXT_CHOSEN(symmetric_extremes(g.data(), t, cluster_rtol, work, Threads{}, pair));
  });
  for (int64_t index = 0; index < count; ++index) {
    const int64_t b = left[index];
    check_loaded(op, allowed, loaded[index], b);
    SymmetricPair& pair = pairs[index];
    if (!settled[index]) {
      const Tensor g = at::empty({1, t, t}, options);
      load_symmetric(h, b, t, g.mutable_data_ptr<double>());
      const SymmetricBatch whole = decomposed_extremes(g, cluster_rtol);
      pair.lambda_max = whole.lambda_max.item<double>();
      pair.lambda_min = whole.lambda_min.item<double>();
      pair.multiplicity_max = whole.multiplicity_max.item<int64_t>();
      pair.multiplicity_min = whole.multiplicity_min.item<int64_t>();
      out.v_max[b].copy_(whole.v_max[0]);
      out.v_min[b].copy_(whole.v_min[0]);
    }
    out.lambda_max.mutable_data_ptr<double>()[b] = pair.lambda_max * loaded[index].scale;
    out.lambda_min.mutable_data_ptr<double>()[b] = pair.lambda_min * loaded[index].scale;
    out.multiplicity_max.mutable_data_ptr<int64_t>()[b] = pair.multiplicity_max;
    out.multiplicity_min.mutable_data_ptr<int64_t>()[b] = pair.multiplicity_min;
  }
  return out;
}

// out = first x x^T + second y y^T.
template <typename T>
void rank_two(int64_t t, double first, const double* x, double second, const double* y, T* out) {
  parallel_for(t, std::max<int64_t>(1, 50000 / t), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double a = first * x[i], b = second * y[i];
      for (int64_t j = 0; j < t; ++j)
        out[i * t + j] = static_cast<T>(a * x[j] + b * y[j]);
    }
  });
}

Tensor gradient_of(
    const char* /*op*/, const Tensor& h, const SymmetricGradient& in, double cluster_rtol) {
  const Call call;
  const int64_t t = h.size(-1);
  const Tensor grad = at::empty_like(h);
  const double* first = in.grad_max.const_data_ptr<double>();
  const double* second = in.grad_min.const_data_ptr<double>();
  const double* x = in.v_max.const_data_ptr<double>();
  const double* y = in.v_min.const_data_ptr<double>();
  const int64_t* multiplicity_max = in.multiplicity_max.const_data_ptr<int64_t>();
  const int64_t* multiplicity_min = in.multiplicity_min.const_data_ptr<int64_t>();
  const auto is_cluster = [&](int64_t b) {
    return (first[b] != 0.0 && multiplicity_max[b] > 1) ||
           (second[b] != 0.0 && multiplicity_min[b] > 1);
  };
  const auto fill = [&](auto* out) {
    for_each_matrix(h.size(0), t * t, [&](int64_t b) {
      if (!is_cluster(b))
        rank_two(t, first[b], x + b * t, second[b], y + b * t, out + b * t * t);
    });
  };
  if (h.scalar_type() == at::kDouble)
    fill(grad.mutable_data_ptr<double>());
  else
    fill(grad.mutable_data_ptr<float>());
  for (int64_t b = 0; b < h.size(0); ++b)
    if (is_cluster(b)) {
      const auto one = [b](const Tensor& all) { return all.narrow(0, b, 1); };
      one(grad).copy_(cluster_gradient(one(h), one(in.grad_max), one(in.grad_min), cluster_rtol));
    }
  return grad;
}

// --- along a trajectory ---------------------------------------------------------------------------

// h / scale as an exactly symmetric, contiguous float64 matrix; scale 0: its own power of two.
Tensor load(const char* op, const Tensor& h, double& scale) {
  TORCH_CHECK_VALUE(h.dim() == 2, op, ": h must have shape [p, p], got ", h.sizes());
  const int64_t t = check_square(op, h);
  const Tensor out = at::empty({t, t}, h.options().dtype(at::kDouble));
  const Loaded loaded = load_symmetric(readable(h), 0, t, out.mutable_data_ptr<double>());
  check_loaded(op, allowed_asymmetry(h), loaded, 0);
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
  const Call call;
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
        IMMUNIZE_EXT_CHOSEN(make_reference(g.data(), r, cluster_rtol, Threads{}, pair)), op,
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
  constexpr const char* op = "symmetric_track";
  const Call call;
  const int64_t t = check_square(op, h), ld = padded(t);
  const auto state = [&](const char* name, const Tensor& x, at::IntArrayRef shape) {
    check_same_device(op, name, x, "h", h);
    check_dtype(op, name, x, at::kDouble);
    check_shape(op, name, x, shape);
    return x.contiguous();
  };
  // What symmetric_reference returns for a matrix of this side, and nothing else.
  const Tensor start = state("vectors", vectors, {2, t}), before = state("matrix", matrix, {t, t});
  const Tensor q = state("reflectors", reflectors, {t, ld});
  const Tensor rows = state("tridiagonal", tridiagonal, {3, ld});
  const Tensor marks = state("ends", ends, {5});
  double scale = marks.const_data_ptr<double>()[kScale];
  TORCH_CHECK_VALUE(
      std::isfinite(scale) && scale > 0.0, op,
      ": ends must hold a positive scale in its last place, got ", scale);
  const Tensor current = load(op, h, scale);
  // Not a number until an extreme is proven.
  const Tensor values = at::full({2}, std::numeric_limits<double>::quiet_NaN(), current.options());
  const Tensor found = start.clone();
  if (t < 2)
    return {values, found, false};
  const Reference r = view(q, rows, marks);
  const double moved = at::linalg_vector_norm(current - before).item<double>();
  const double size =
      std::max(std::abs(r.lambda[0]), std::abs(r.lambda[1])) + moved;  // at least |h|_2
  const double near = cluster_rtol * size + noise_bound(t, size);
  const double* from = current.const_data_ptr<double>();
  for (int end = 0; end < 2; ++end) {
    double theta = 0.0;
    double* x = found.mutable_data_ptr<double>() + end * t;
    const double residual = IMMUNIZE_EXT_CHOSEN(follow(from, r, end, size, Threads{}, x, theta));
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

const SymmetricEngine cpu_symmetric{&extremes_of, &gradient_of};

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("symmetric_reference", &symmetric_reference);
  m.impl("symmetric_track", &symmetric_track);
}

}  // namespace immunize_ext
