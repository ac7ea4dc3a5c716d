// Extremes of a batch of large symmetric matrices, and extreme singular triplets of large features
// by their thin Gram matrix, from block Krylov spaces, found and then proven: a composition of ATen
// operators, for devices where only the library's own solvers are fast; it names none.
//
// A full eigendecomposition costs more than ten factorisations. Here a matrix is multiplied with
// panels of 16 vectors and factorised a few times, as cpu/krylov.inl does; the derivations of the
// proof stand there. In short, an end at a time, with s = +-1 making it the top of s H:
//
// 1. Search. The block Krylov space of H from a fixed start gives both ends roughly; spaces of
//    (sigma I - s H)^-1, with a Cholesky factorisation that exists beyond the end, give them well.
// 2. Proof. For the 16 vectors X found and c = 2 |H| factorise B = tau I - s H + c X X^T, with tau
//    in the first gap below the end. If that exists, s H has as many eigenvalues above tau as
//    S = I / c - X^T B^-1 X has below zero (Sylvester), and as many Ritz values above tau, by more
//    than their residuals, are all of them (Kahan). The same factor improves the vectors:
//    (tau I - s H)^-1 = B^-1 + B^-1 X S^-1 X^T B^-1 (Woodbury).
//
// The matrices of a batch go in step; the host waits once a round, to see whether all are proven.
// Whatever is not (a cluster wider than the block, no gap within reach) is left to the caller.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "symmetric.h"

namespace immunize_ext::krylov {

using at::Tensor;

// From this side on. Chosen as on the CPU; not measured on hardware.
constexpr int64_t kSide = 1024;
constexpr int64_t kBlock = 16;
constexpr int64_t kMostAbove = kBlock - 4;  // eigenvalues above tau: some vectors are to spare
constexpr int kForwardSteps = 6, kInverseSteps = 5, kPolishingSteps = 4;
constexpr int kSearches = 3, kShifts = 5, kProofs = 4;

// The 16 vectors of one end: Ritz values of s H, descending, and |s H x - theta x|.
struct End {
  Tensor theta, x, residual;  // [n, 16], [n, t, 16], [n, 16]
  Tensor proven, above, tau;  // [n]
};

inline Tensor orthonormal(const Tensor& x) {
  return std::get<0>(at::linalg_qr(x));
}

inline Tensor symmetric(const Tensor& m) {
  return (m + m.mT()) * 0.5;
}

// Numbers [n] as factors of matrices or panels.
inline Tensor per_matrix(const Tensor& numbers) {
  return numbers.view({-1, 1, 1});
}

// Rounding in a Rayleigh quotient or a factorisation of a matrix of this size, [n].
inline Tensor noise_of(int64_t t, const Tensor& size) {
  return size * (4.0 * static_cast<double>(std::max<int64_t>(t, 16)) *
                 std::numeric_limits<double>::epsilon());
}

inline Tensor where_each(const Tensor& chosen, const Tensor& yes, const Tensor& no) {
  std::vector<int64_t> shape(yes.dim(), 1);
  shape[0] = -1;
  return at::where(chosen.view(shape), yes, no);
}

// Basis [n, t, 16 steps] of the space of x and its images, eigenvalues and vectors of the operator
// in it.
template <typename Apply>
std::tuple<Tensor, Tensor, Tensor> space(const Apply& apply, const Tensor& x, int steps) {
  std::vector<Tensor> basis{orthonormal(x)}, images;
  for (int step = 0; step < steps; ++step) {
    images.push_back(apply(basis.back()));
    if (step + 1 == steps)
      break;
    const Tensor known = at::cat(basis, -1);
    Tensor next = images.back();
    // Twice is enough (Parlett 1998, 6.9), and once more for what the normalisation brought up.
    for (int pass = 0; pass < 2; ++pass)
      next = next - known.matmul(known.mT().matmul(next));
    next = orthonormal(next);
    basis.push_back(orthonormal(next - known.matmul(known.mT().matmul(next))));
  }
  const Tensor v = at::cat(basis, -1);
  const auto [values, vectors] = at::linalg_eigh(symmetric(v.mT().matmul(at::cat(images, -1))));
  return {v, values, vectors};
}

// Ritz values, vectors and residuals of s H in the span of x.
inline void rayleigh_ritz(const Tensor& h, double sign, const Tensor& x, End& end) {
  const Tensor q = orthonormal(x), image = h.matmul(q) * sign;
  const Tensor vectors = std::get<1>(at::linalg_eigh(symmetric(q.mT().matmul(image)))).flip({-1});
  end.x = q.matmul(vectors);
  const Tensor rotated = image.matmul(vectors);
  end.theta = (end.x * rotated).sum(1) / end.x.square().sum(1);
  end.residual = at::linalg_vector_norm(rotated - end.x * end.theta.unsqueeze(1), 2, {1});
}

inline void take(const Tensor& chosen, const End& found, End& end) {
  end.theta = where_each(chosen, found.theta, end.theta);
  end.residual = where_each(chosen, found.residual, end.residual);
  end.x = where_each(chosen, found.x, end.x);
}

// Brings the vectors near the end by inverse spaces from beyond it.
inline void search(const Tensor& h, double sign, const Tensor& noise, End& end) {
  const Tensor identity = at::eye(h.size(1), h.options());
  for (int round = 0; round < kSearches; ++round) {
    const Tensor top = end.theta.select(1, 0);
    const Tensor spread = top - end.theta.select(1, kBlock - 1);
    Tensor margin =
        at::maximum(at::maximum(end.residual.select(1, 0) * 2.0, spread * 0.02), noise * 4.0);
    // Where definiteness is plausible it is the better guess: zero may be much nearer.
    Tensor at_zero = (top < 0).logical_and(top + margin > 0);
    Tensor sigma = (top + margin).masked_fill(at_zero, 0.0), factor, exists;
    for (int shift = 0; shift < kShifts; ++shift) {
      const auto [lower, info] = at::linalg_cholesky_ex(per_matrix(sigma) * identity - h * sign);
      factor = lower;
      exists = info == 0;
      if (exists.all().item<bool>())
        break;
      margin = at::where(exists.logical_or(at_zero), margin, margin * 8.0);
      sigma = at::where(exists, sigma, top + margin);
      at_zero = at_zero.logical_and(exists);
    }
    factor = where_each(exists, factor, identity.expand_as(h));
    const auto solve = [&](const Tensor& y) { return at::cholesky_solve(y, factor); };
    const auto [basis, values, vectors] = space(solve, end.x, kInverseSteps);
    const int64_t width = values.size(1);
    End found;
    rayleigh_ritz(h, sign, basis.matmul(vectors.narrow(2, width - kBlock, kBlock)), found);
    const Tensor better = (found.residual.select(1, 0) <= end.residual.select(1, 0))
                              .logical_or(found.theta.select(1, 0) > top);
    take(exists.logical_and(better), found, end);
    const Tensor gap = end.theta.select(1, 0) - end.theta.select(1, kBlock - 1);
    if ((end.residual.select(1, 0) <= gap * 0.05).all().item<bool>())
      return;
  }
}

// Where the Ritz values above tau are all there are, the first one to noise and those that may
// belong to it as well.
inline Tensor is_proven(
    const End& end,
    const Tensor& above,
    const Tensor& tau,
    const Tensor& near,
    const Tensor& noise) {
  const Tensor number = at::arange(kBlock, above.options());
  const Tensor inside = number < above.unsqueeze(1);
  const Tensor first = end.theta.select(1, 0);
  const Tensor total = (end.residual.square() * inside).sum(1).sqrt();
  const Tensor last = end.theta.gather(1, (above - 1).clamp(0, kBlock - 1).unsqueeze(1)).squeeze(1);
  const Tensor apart = first.unsqueeze(1) - end.theta > near.unsqueeze(1) * 4.0;
  const Tensor accurate =
      inside.logical_not().logical_or(apart).logical_or(end.residual <= noise.unsqueeze(1));
  return (above >= 1)
      .logical_and(above <= kMostAbove)
      .logical_and(first - tau > near + noise * 2.0)
      .logical_and(accurate.all(1))
      .logical_and(end.residual.select(1, 0) <= noise)
      .logical_and(last - total > tau + noise);
}

// (s H - tau)^-1 by the factor of B = tau I - s H + c X X^T, and what that says.
struct Deflated {
  Tensor serves;  // [n] bool: B has a factor, and no eigenvalue lies at tau
  Tensor above;   // [n] int64: eigenvalues of s H above tau
  Tensor factor, x, y, inverse;

  Deflated(const Tensor& h, double sign, const Tensor& size, const Tensor& tau, const Tensor& x)
      : x(x) {
    const Tensor identity = at::eye(h.size(1), h.options()), small = at::eye(kBlock, h.options());
    const Tensor c = size * 2.0;
    const auto [lower, info] = at::linalg_cholesky_ex(
        at::baddbmm(per_matrix(tau) * identity - h * sign, x * per_matrix(c), x.mT()));
    factor = where_each(info == 0, lower, identity.expand_as(h));
    y = at::cholesky_solve(x, factor);
    auto [weights, vectors] = at::linalg_eigh(symmetric(small / per_matrix(c) - x.mT().matmul(y)));
    // Not a sign that rounding could have made.
    serves = (info == 0).logical_and(
        (weights.abs() > weights.abs().amax(1, /*keepdim=*/true) * 1e-9).all(1));
    above = (weights < 0).sum(1);
    weights = where_each(serves, weights, at::ones_like(weights));
    inverse = (vectors / weights.unsqueeze(1)).matmul(vectors.mT());
  }

  Tensor solve(const Tensor& z) const {
    const Tensor solved = at::cholesky_solve(z, factor);
    return -(solved + y.matmul(inverse.matmul(x.mT().matmul(solved))));
  }
};

inline void prove(
    const Tensor& h,
    double sign,
    const Tensor& size,
    const Tensor& near,
    const Tensor& noise,
    End& end) {
  const int64_t n = h.size(0);
  const Tensor number = at::arange(kBlock, h.options().dtype(at::kLong));
  end.proven = at::zeros({n}, h.options().dtype(at::kBool));
  end.above = at::zeros({n}, h.options().dtype(at::kLong));
  end.tau = at::zeros({n}, h.options());
  for (int round = 0; round < kProofs; ++round) {
    // tau: the middle of the first gap that no cluster reaches over.
    const Tensor distance = end.theta.select(1, 0).unsqueeze(1) - end.theta;
    const Tensor beyond = distance > (near * 2.0 + noise * 4.0).unsqueeze(1);
    const Tensor next = beyond.to(at::kLong).argmax(1, /*keepdim=*/true);
    const Tensor tau = end.theta.select(1, 0) - distance.gather(1, next).squeeze(1) * 0.5;
    const Deflated d(h, sign, size, tau, end.x);
    const Tensor serves = d.serves.logical_and(beyond.any(1));
    const auto solve = [&](const Tensor& z) { return d.solve(z); };
    for (const bool polish : {true, false}) {
      Tensor next_x;
      if (polish) {
        const auto [basis, values, inside] = space(solve, end.x, kPolishingSteps);
        const Tensor largest =
            values.abs().argsort(1, /*descending=*/true).narrow(1, 0, kBlock).unsqueeze(1);
        next_x = basis.matmul(inside.gather(2, largest.expand({-1, inside.size(1), -1})));
      } else {
        // Rounding in the inverse, not in the space: one step of Newton's method with the residual
        // of H itself takes it away.
        const Tensor residual = h.matmul(end.x) * sign - end.x * end.theta.unsqueeze(1);
        const Tensor moved = (number < d.above.unsqueeze(1)).unsqueeze(1);
        next_x = end.x - d.solve(residual * moved);
      }
      End found;
      rayleigh_ritz(h, sign, next_x, found);
      take(serves.logical_and(end.proven.logical_not()), found, end);
      const Tensor proven = serves.logical_and(is_proven(end, d.above, tau, near, noise))
                                .logical_and(end.proven.logical_not());
      end.above = at::where(proven, d.above, end.above);
      end.tau = at::where(proven, tau, end.tau);
      end.proven = end.proven.logical_or(proven);
      if (end.proven.all().item<bool>())
        return;
    }
  }
}

// Both ends of h [n, t, t] roughly, the top first.
inline std::array<End, 2> start_ends(const Tensor& h) {
  const int64_t n = h.size(0), t = h.size(1);
  // Always the same start; nothing of the caller's random state is touched.
  const Tensor start = at::randn(
                           {t, kBlock}, at::detail::createCPUGenerator(20250701),
                           at::TensorOptions().dtype(at::kDouble))
                           .to(h.device());
  const auto multiply = [&](const Tensor& x) { return h.matmul(x); };
  const auto [basis, values, vectors] =
      space(multiply, start.expand({n, t, kBlock}), kForwardSteps);
  const int64_t width = values.size(1);
  std::array<End, 2> ends;
  rayleigh_ritz(h, 1.0, basis.matmul(vectors.narrow(2, width - kBlock, kBlock)), ends[0]);
  rayleigh_ritz(h, -1.0, basis.matmul(vectors.narrow(2, 0, kBlock)), ends[1]);
  return ends;
}

// About |h|, [n]; not zero, for matrices that are.
inline Tensor size_of(const std::array<End, 2>& ends) {
  return at::maximum(ends[0].theta.select(1, 0).abs(), ends[1].theta.select(1, 0).abs())
      .clamp_min(1e-100);
}

// Extremes of h [n, t, t], exactly symmetric, finite, entries up to 2 in magnitude; and where they
// are proven, [n] bool. Elsewhere they have no meaning.
inline std::pair<Tensor, SymmetricBatch> extremes(const Tensor& h, double cluster_rtol) {
  const int64_t n = h.size(0), t = h.size(1);
  std::array<End, 2> ends = start_ends(h);
  for (int k = 0; k < 2; ++k) {
    const double sign = k == 0 ? 1.0 : -1.0;
    search(h, sign, noise_of(t, size_of(ends)), ends[k]);
    const Tensor size = size_of(ends), noise = noise_of(t, size);
    // 1.5: what the estimate of the size may lack.
    prove(h, sign, size, size * (1.5 * cluster_rtol) + noise, noise, ends[k]);
  }
  const Tensor size = size_of(ends), near = size * cluster_rtol, noise = noise_of(t, size);
  const Tensor number = at::arange(kBlock, h.options().dtype(at::kLong));
  SymmetricBatch found;
  Tensor proven = at::ones({n}, h.options().dtype(at::kBool));
  Tensor counts[2];
  for (int k = 0; k < 2; ++k) {
    const End& end = ends[k];
    const Tensor distance = end.theta.select(1, 0).unsqueeze(1) - end.theta;
    counts[k] = (distance <= near.unsqueeze(1)).logical_and(number < end.above.unsqueeze(1)).sum(1);
    proven = proven.logical_and(end.proven)
                 .logical_and(end.theta.select(1, 0) - end.tau > near + noise * 2.0);
  }
  found.multiplicity_max = counts[0];
  found.multiplicity_min = counts[1];
  found.lambda_max = ends[0].theta.select(1, 0);
  found.lambda_min = at::minimum(-ends[1].theta.select(1, 0), found.lambda_max);
  found.v_max = ends[0].x.select(2, 0);
  found.v_min = ends[1].x.select(2, 0);
  return {proven, found};
}

// Extreme singular triplets of features, where both are simple and the rank is full.
struct Triplets {
  Tensor proven;                // [n] bool; where false the rest has no meaning
  Tensor sigma_max, sigma_min;  // [n]
  Tensor thin_max, thin_min;    // [n, t]
  Tensor long_max, long_min;    // [n, k]
  Tensor thin_gram;             // [n, t, t]; always right
};

// u = X e_1, and sigma and v of the smallest triplet of s [n, t, k], refined from the features
// themselves (derivation: cpu/gram_krylov.inl). Returns where it is as accurate as a singular value
// decomposition.
inline Tensor refine_smallest(
    const Tensor& s, const Deflated& d, const Tensor& tolerance, Tensor& x, Triplets& out) {
  constexpr int kSteps = 6;
  const Tensor number = at::arange(kBlock, s.options().dtype(at::kLong));
  Tensor done = at::zeros({s.size(0)}, s.options().dtype(at::kBool));
  const auto norm = [](const Tensor& rows) { return at::linalg_vector_norm(rows, 2, {1}); };
  for (int step = 0; step < kSteps; ++step) {
    Tensor w = s.mT().matmul(x);  // [n, k, 16]
    const Tensor vectors = std::get<1>(at::linalg_eigh(symmetric(w.mT().matmul(w))));
    x = x.matmul(vectors);
    w = w.matmul(vectors);
    const Tensor lengths = norm(w).clamp_min(1e-100);  // [n, 16]
    const Tensor v = w / lengths.unsqueeze(1);
    const Tensor residual = s.matmul(v) - x * lengths.unsqueeze(1);
    const Tensor sigma = lengths.select(1, 0), u = x.select(2, 0);
    // Rounding in w, taken back from v.
    const Tensor first = residual.narrow(2, 0, 1);
    const Tensor inside = x.mT().matmul(first);  // [n, 16, 1]
    Tensor weights = inside.squeeze(2) * lengths / (lengths.square() + sigma.square().unsqueeze(1));
    weights = weights.masked_fill(number.unsqueeze(0) == 0, 0.0);
    const Tensor change = s.mT().matmul(d.solve(first - x.matmul(inside))).squeeze(2) -
                          v.matmul(weights.unsqueeze(2)).squeeze(2);
    Tensor better = v.select(2, 0) + change;
    better = better / norm(better).unsqueeze(1);
    const Tensor left = s.matmul(better.unsqueeze(2)).squeeze(2) - u * sigma.unsqueeze(1);
    const Tensor plain = norm(first.squeeze(2)) <= tolerance;
    const Tensor refined = at::maximum(norm(change) * sigma, norm(left)) <= tolerance;
    const Tensor settled = done.logical_not().logical_and(plain.logical_or(refined));
    const Tensor along_v = where_each(plain, v.select(2, 0), better);
    if (step == 0) {
      out.sigma_min = sigma;
      out.thin_min = u;
      out.long_min = along_v;
    } else {
      out.sigma_min = at::where(settled, sigma, out.sigma_min);
      out.thin_min = where_each(settled, u, out.thin_min);
      out.long_min = where_each(settled, along_v, out.long_min);
    }
    done = done.logical_or(settled);
    if (done.all().item<bool>())
      break;
    const Tensor moved = (number < d.above.unsqueeze(1)).unsqueeze(1);
    x = orthonormal(x + d.solve(residual * lengths.unsqueeze(1) * moved));
  }
  return done;
}

// s [n, t, k], t <= k, float64, finite, entries up to 2 in magnitude.
inline Triplets triplets(const Tensor& s, double rank_rtol, double cluster_rtol) {
  const int64_t t = s.size(1), k = s.size(2);
  const Tensor g = at::bmm(s, s.mT());
  std::array<End, 2> ends = start_ends(g);
  const double c = cluster_rtol;
  search(g, 1.0, noise_of(t, size_of(ends)), ends[0]);
  Tensor size = size_of(ends), noise = noise_of(t, size);
  prove(g, 1.0, size, size * (1.5 * c * (2.0 - c)) + noise * 2.0, noise, ends[0]);
  size = size_of(ends);
  noise = noise_of(t, size);
  const Tensor sigma_max = size.sqrt();
  search(g, -1.0, noise, ends[1]);
  const auto near_bottom = [&] {
    const Tensor lambda = (-ends[1].theta.select(1, 0)).clamp_min(0.0);
    return (lambda.sqrt() * 2.0 + sigma_max * c) * (sigma_max * c);
  };
  prove(g, -1.0, size, near_bottom() + noise * 2.0, noise, ends[1]);
  const Tensor lambda_min = -ends[1].theta.select(1, 0);
  const auto alone = [&](const End& end, const Tensor& near) {
    const Tensor distance = end.theta.select(1, 0) - end.theta.select(1, 1);
    return end.proven.logical_and(distance > near + noise * 4.0)
        .logical_and(end.theta.select(1, 0) - end.tau > near + noise * 4.0);
  };
  Triplets out;
  out.thin_gram = g;
  out.proven = alone(ends[0], size * (c * (2.0 - c)))
                   .logical_and(alone(ends[1], near_bottom()))
                   .logical_and(lambda_min > size * (rank_rtol * rank_rtol) + noise * 2.0);
  // A step of the refinement shrinks the error by about (theta_1 - tau) / (theta_17 - tau): a tau
  // of its own, close to the end.
  const Tensor end = ends[1].theta.select(1, 0);
  const Tensor tau = end - at::maximum((end - ends[1].tau) * 0.02, noise * 4.0);
  const Deflated d(g, -1.0, size, tau, ends[1].x);
  const double units = 4.0 * std::sqrt(static_cast<double>(t + k));
  const Tensor tolerance = sigma_max * (units * std::numeric_limits<double>::epsilon());
  Tensor x = ends[1].x;
  const Tensor accurate = refine_smallest(s, d, tolerance, x, out);
  out.proven = out.proven.logical_and(d.serves).logical_and(accurate).logical_and(
      (out.sigma_min.square() - lambda_min).abs() <= noise);
  out.thin_max = ends[0].x.select(2, 0);
  const Tensor along_max = s.mT().matmul(out.thin_max.unsqueeze(2)).squeeze(2);
  out.sigma_max = at::linalg_vector_norm(along_max, 2, {1}).clamp_min(1e-100);
  out.long_max = along_max / out.sigma_max.unsqueeze(1);
  return out;
}

}  // namespace immunize_ext::krylov
