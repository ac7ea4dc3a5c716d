// Extreme singular triplets of one large matrix by the library's eigendecomposition of its thin Gram
// matrix, proven or refused: a composition of ATen operators, for devices where only the library's
// own solvers are fast. It names no device.
//
// Let S (t x k, t <= k) have its largest entry in [1, 2), G = S S^T = U diag(lambda) U^T. The bounds
// are those of cpu/gram_route.inl, where they are derived: each lambda is known to
// noise = 4 max(t, 16) eps lambda_max, and
// 1. counts (rank, members of a cluster) are taken from G where they are the same with the threshold
//    moved by what lambda and threshold may be wrong by, up and down: features in float32, whose
//    tolerance of the rank lies far above noise, may be short of rank;
// 2. a triplet is measured on S itself: u, w = S^T u, sigma = |w|, v = w / sigma, r = S v - sigma u.
//    It is exact for a matrix that differs from S by |r|, and is accepted if
//    |r| <= 4 sqrt(t + k) eps sigma_max;
// 3. where r is larger, a block of 16 vectors at that end is improved: Rayleigh and Ritz in the
//    images S^T X, then a step of Newton's method with residuals of S,
//      X <- X - Y diag(1 / (lambda_Y - lambda)) Y^T R diag(sigma),  Y = the other eigenvectors,
//    which multiplies the error by noise / gap beyond the block. Rounding in w is taken back from v:
//      v <- v - S^T (G + lambda)^-1 r.
//
// What is refused (a rank that G cannot see, kappa beyond about 1e6) is left to Jacobi's method, with
// U as a start: the columns of S^T U are orthogonal but for rounding (Drmac and Veselic, "New fast
// and accurate Jacobi SVD algorithm", SIAM J. Matrix Anal. Appl. 29, 2008).
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "extremes.h"

namespace immunize_ext::thin_gram {

using at::Tensor;

constexpr int64_t kBlock = 16;
constexpr int kSteps = 4;

struct Triplet {
  bool accurate = false;
  double sigma = 0.0;
  Tensor u, v;  // [t], [k]
  // Of the block, ascending, where one was needed: singular values of S to within `unsure`.
  std::vector<double> block;
  double unsure = 0.0;
};

struct Eigenpairs {
  Tensor lambda, u;       // [t] ascending, [t, t] columns
  const double* on_host;  // lambda
  Tensor host;            // keeps it
  double noise = 0.0;

  explicit Eigenpairs(const Tensor& gram) {
    std::tie(lambda, u) = at::linalg_eigh(gram);
    host = lambda.cpu();
    on_host = host.const_data_ptr<double>();
    noise = 4.0 * static_cast<double>(std::max<int64_t>(side(), 16)) *
            std::numeric_limits<double>::epsilon() * std::max(largest(), 0.0);
  }
  int64_t side() const {
    return lambda.size(0);
  }
  double largest() const {
    return on_host[side() - 1];
  }
};

// Which of some values, ascending, lie below a bound that may be off by `unsure`; -1 if that decides.
inline int64_t count_below(const double* from, const double* to, double bound, double unsure) {
  const int64_t least = std::lower_bound(from, to, bound - unsure) - from;
  return least == std::lower_bound(from, to, bound + unsure) - from ? least : -1;
}

// Vectors u of S, measured: sigma = |S^T u|, v = S^T u / sigma, and S v - sigma u.
struct Measured {
  Tensor v, sigma, residual;  // [k, m], [m], [t, m]

  Measured(const Tensor& s, const Tensor& u) {
    const Tensor w = s.mT().matmul(u);
    sigma = at::linalg_vector_norm(w, 2, {0}).clamp_min(1e-100);
    v = w / sigma;
    residual = s.matmul(v) - u * sigma;
  }
};

// The triplet of eigenvalue number `end` (ascending), the largest or the smallest that counts; the
// block lies on its inner side.
inline Triplet triplet(const Tensor& s, const Eigenpairs& e, int64_t end, double tolerance) {
  const auto norm = [](const Tensor& x) { return at::linalg_vector_norm(x); };
  const int64_t t = s.size(0);
  const bool top = end == t - 1;
  const int64_t m = std::min(kBlock, top ? t : t - end), first = top ? t - m : end;
  Triplet out;
  const auto accept = [&out](const Tensor& u, const Tensor& v, double sigma) {
    out.accurate = true;
    out.sigma = sigma;
    out.u = u.contiguous();
    out.v = v.contiguous();
    return out;
  };
  {
    const Tensor u = e.u.narrow(1, end, 1);
    const Measured found(s, u);
    const Tensor numbers = at::stack({found.sigma[0], norm(found.residual)}).cpu();
    const double* measured = numbers.const_data_ptr<double>();
    if (measured[1] <= tolerance)
      return accept(u.select(1, 0), found.v.select(1, 0), measured[0]);
  }
  const auto outside = [&](const Tensor& x, int64_t dim) {
    return at::cat({x.narrow(dim, 0, first), x.narrow(dim, first + m, t - first - m)}, dim);
  };
  const Tensor others = outside(e.u, 1);
  // Nothing moves along vectors that noise could exchange with the block's.
  Tensor gaps = outside(e.lambda, 0) - e.on_host[end];
  gaps = gaps.masked_fill(gaps.abs() <= e.noise, std::numeric_limits<double>::infinity());
  Tensor x = e.u.narrow(1, first, m);
  for (int step = 0; step < kSteps; ++step) {
    const Tensor w = s.mT().matmul(x);
    // Of this size on the host: cheaper than the launches of the device's solver.
    x = x.matmul(std::get<1>(at::linalg_eigh(w.mT().matmul(w).cpu())).to(s.device()));
    const Measured found(s, x);
    const int64_t column = top ? m - 1 : 0;
    const Tensor u = x.select(1, column), v = found.v.select(1, column);
    const Tensor residual = found.residual.select(1, column), sigma = found.sigma[column];
    const Tensor within = e.lambda.clamp_min(0.0) + sigma.square();
    const Tensor change = s.mT().mv(e.u.mv(e.u.mT().mv(residual) / within));
    const Tensor moved = v - change, better = moved / norm(moved);
    const Tensor numbers =
        at::cat({found.sigma, at::stack(
                                  {norm(residual), norm(change) * sigma,
                                   norm(s.mv(better) - u * sigma), norm(found.residual)})})
            .cpu();
    const double *block = numbers.const_data_ptr<double>(), *measured = block + m;
    const bool plain = measured[0] <= tolerance;
    if (plain || std::max(measured[1], measured[2]) <= tolerance) {
      out.block.assign(block, block + m);
      out.unsure = measured[3];
      return accept(u, plain ? v : better, block[column]);
    }
    const Tensor coefficients = others.mT().matmul(found.residual * found.sigma);
    x = std::get<0>(at::linalg_qr(x - others.matmul(coefficients / gaps.unsqueeze(1))));
  }
  return out;
}

// Extremes of S; where they are not proven the rest has no meaning.
struct Extremes {
  bool proven = false, has_min = true;
  Triplet max, min;
  int64_t rank = 0, multiplicity_max = 0, multiplicity_min = 0;
};

// s [t, k], t <= k, float64, finite, its largest entry in [1, 2). Where the smallest is not wanted
// the rank may be wrong, but is not 0.
inline Extremes extremes(
    const Tensor& s, const Eigenpairs& e, const Policy& policy, const Wanted& wanted) {
  const int64_t t = s.size(0);
  const double c = policy.cluster_rtol, units = 4.0 * std::sqrt(static_cast<double>(t + s.size(1)));
  Extremes out;
  if (!(e.largest() > 0.0))  // zero, or not a number
    return out;
  const double counts = policy.rank_rtol * policy.rank_rtol * e.largest();
  const int64_t missing = count_below(e.on_host, e.on_host + t, counts, 2.0 * e.noise);
  if (missing < 0 && wanted.min)
    return out;
  out.rank = t - std::max<int64_t>(missing, 0);
  out.has_min = wanted.min && !(policy.full_rank && policy.full_side > out.rank);
  const double eps = std::numeric_limits<double>::epsilon();
  const double tolerance = units * eps * std::sqrt(e.largest());
  const auto is_right = [&e](const Triplet& x, double lambda) {
    return x.accurate && std::abs(x.sigma * x.sigma - lambda) <= e.noise;
  };
  out.max = triplet(s, e, t - 1, tolerance);
  if (!is_right(out.max, e.largest()))
    return out;
  // The extremes themselves are members of their clusters whatever rounding says.
  const double edge = std::max(1.0 - c, 0.0) * out.max.sigma;
  const int64_t apart = count_below(e.on_host, e.on_host + t - 1, edge * edge, 2.0 * e.noise);
  if (apart < 0)
    return out;
  out.multiplicity_max = t - apart;
  if (!out.has_min) {
    out.multiplicity_min = policy.full_side - out.rank;
    out.proven = true;
    return out;
  }
  out.min = triplet(s, e, missing, tolerance);
  if (!is_right(out.min, e.on_host[missing]))
    return out;
  out.min.sigma = std::min(out.min.sigma, out.max.sigma);
  const double reach = out.min.sigma + c * out.max.sigma;
  const double* above = e.on_host + missing + 1;
  int64_t others = count_below(above, e.on_host + t, reach * reach, 2.0 * e.noise);
  // What G cannot tell apart S can, where the cluster ends within the block.
  const std::vector<double>& block = out.min.block;
  if (others < 0 && !block.empty()) {
    others = count_below(block.data() + 1, block.data() + block.size(), reach, out.min.unsure);
    others = others + 1 < static_cast<int64_t>(block.size()) ? others : -1;
  }
  out.multiplicity_min = others + 1;
  out.proven = out.multiplicity_min > 0;
  return out;
}

}  // namespace immunize_ext::thin_gram
