// Extreme singular triplets of large matrices by the library's eigendecomposition of their thin
// Gram matrices, proven or refused: a composition of ATen operators, for devices where only the
// library's own solvers are fast. It names no device.
//
// Let S (t x k, t <= k) be such a matrix, G = S S^T = U diag(lambda) U^T. The bounds are those of
// cpu/gram_route.inl, where they are derived: each lambda is known to 4 max(t, 16) eps lambda_max.
// 1. Counts (rank, members of a cluster) are taken from G where they are the same with the threshold
//    moved by what lambda and threshold may be wrong by, up and down: features in float32, whose
//    tolerance of the rank lies far above noise, may be short of rank. Where the rank or the edge of
//    the lowest cluster lies in the noise, S itself decides (thin_gram_eigenpairs.h).
// 2. A triplet is measured on S itself: u, w = S^T u, sigma = |w|, v = w / sigma, r = S v - sigma u.
//    It is exact for a matrix that differs from S by |r|, and is accepted if
//    |r| <= 4 sqrt(t + k) eps sigma_max. Before that u takes a step of Newton's method,
//      u <- u - Y diag(1 / (lambda_Y - lambda)) Y^T r sigma,  Y = the other eigenvectors,
//    which multiplies its error by noise / gap, and rounding in w is taken back from v:
//      v <- v - S^T (G + lambda)^-1 r.
//    Both ends of a whole batch take these steps together, with one wait for the device.
// 3. Where that is not enough, a block of 16 vectors at the inner side of the end takes the steps
//    together with Rayleigh and Ritz in the images S^T X: the gap is then that beyond the block.
//
// What is refused (singular values at the threshold of the rank, clusters at the top whose edge is
// in doubt) is left to Jacobi's method, with U as a start: the columns of S^T U are orthogonal but
// for rounding (Drmac and Veselic, "New fast and accurate Jacobi SVD algorithm", SIAM J. Matrix Anal.
// Appl. 29, 2008).
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "extremes.h"
#include "thin_gram_eigenpairs.h"

namespace immunize_ext::thin_gram {

constexpr int64_t kBlock = 16;
constexpr int kSteps = 4;  // of a block
constexpr int kTurns = 2;  // of a long vector

struct Triplet {
  bool accurate = false;
  double sigma = 0.0;
  Tensor u, v;  // [t], [k]; none: those of the look
};

inline Tensor lengths(const Tensor& columns) {
  return at::linalg_vector_norm(columns, 2, {-2}, /*keepdim=*/true);
}

// Vectors u of S, measured: w = S^T u, sigma = |w|, v = w / sigma, and S v - sigma u.
struct Measured {
  Tensor u, w, v, sigma, residual;  // [*, t, m], [*, k, m] twice, [*, 1, m], [*, t, m]

  Measured(const Tensor& s, const Tensor& u) : u(u), w(s.mT().matmul(u)) {
    sigma = lengths(w).clamp_min_(1e-100);
    v = w / sigma;
    residual = at::addcmul(s.matmul(v), u, sigma, -1.0);
  }
};

// Vectors that G says belong to some of its eigenvalues, m of each matrix of a batch, after one step
// for u and one for v, and what S says of them.
struct Look {
  Tensor u, v;     // [batch, t, m], [batch, k, m]
  Tensor numbers;  // [batch, 3, m] on the host: sigma, |S v - sigma u|, |S^T u - sigma v|

  // s [batch, t, k]; lambda [batch, t] and basis [batch, t, t]: those of the pairs; ends: m numbers of
  // eigenvalues for each.
  Look(
      const Tensor& s,
      const Tensor& lambda,
      const Tensor& basis,
      const std::vector<Eigenpairs>& pairs,
      const std::vector<int64_t>& ends) {
    const int64_t batch = s.size(0), t = s.size(1), all = static_cast<int64_t>(ends.size());
    const int64_t m = all / batch;
    std::vector<Tensor> rows;
    std::vector<double> bounds(2 * all);
    for (int64_t i = 0; i < all; ++i) {
      const Eigenpairs& e = pairs[i / m];
      rows.push_back(e.u.mT().narrow(0, ends[i], 1));
      bounds[i] = e.value[ends[i]];
      bounds[all + i] = e.error.back();
    }
    const Tensor on_device = at::tensor(bounds, at::kDouble).to(s.device()).view({2, batch, 1, m});
    // Nothing moves along vectors that noise could exchange with these.
    const Tensor column = lambda.unsqueeze(2);
    Tensor gaps = column - on_device[0];
    gaps.masked_fill_(gaps.abs() <= on_device[1], std::numeric_limits<double>::infinity());
    const Measured first(s, at::cat(rows).view({batch, m, t}).mT());
    const Tensor change = basis.mT().matmul(first.residual) * first.sigma / gaps;
    const Tensor moved = first.u.baddbmm(basis, change, 1.0, -1.0);
    u = moved / lengths(moved);
    const Measured found(s, u);
    const Tensor within = found.sigma.square() + column.clamp_min(0.0);
    const Tensor step = basis.matmul(basis.mT().matmul(found.residual) / within);
    const Tensor better = found.v.baddbmm(s.mT(), step, 1.0, -1.0);
    v = better / lengths(better);
    const auto off = [&found](const Tensor& image, const Tensor& x) {
      return lengths(at::addcmul(image, x, found.sigma, -1.0));
    };
    numbers = at::cat({found.sigma, off(s.matmul(v), u), off(found.w, v)}, 1).cpu();
  }
  // Of column `column` of matrix `number`.
  Triplet triplet(int64_t number, int64_t column, double tolerance) const {
    const auto size = numbers.accessor<double, 3>()[number];
    Triplet out;
    out.accurate = std::max(size[1][column], size[2][column]) <= tolerance;
    out.sigma = size[0][column];
    return out;
  }
};

// Makes x, orthonormal but for a small step, orthonormal and its images orthogonal, ascending. Of the
// size of a block, and so on the host: cheaper than the launches of the device's solver.
inline Tensor ritz_rotation(const Tensor& images, const Tensor& x) {
  const Tensor products = at::stack({images.mT().matmul(images), x.mT().matmul(x)}).cpu();
  const Tensor factor = at::linalg_cholesky(products[1]);
  const auto solve = [&factor](const Tensor& b) {
    return at::linalg_solve_triangular(factor, b, /*upper=*/false);
  };
  const Tensor rotation = std::get<1>(at::linalg_eigh(solve(solve(products[0]).mT())));
  return at::linalg_solve_triangular(factor.mT(), rotation, /*upper=*/true);
}

// The triplet of eigenvalue number `end` (ascending), the largest or the smallest that counts, from
// a block on its inner side.
inline Triplet improved(const Tensor& s, const Eigenpairs& e, int64_t end, double tolerance) {
  const auto norm = [](const Tensor& x) { return at::linalg_vector_norm(x); };
  const int64_t t = s.size(0);
  const bool top = end == t - 1;
  const int64_t m = std::min(kBlock, top ? t : t - end), first = top ? t - m : end;
  const auto outside = [&](const Tensor& x, int64_t dim) {
    return at::cat({x.narrow(dim, 0, first), x.narrow(dim, first + m, t - first - m)}, dim);
  };
  const Tensor others = outside(e.u, 1);
  // Nothing moves along vectors that noise could exchange with the block's.
  const double value = e.value[end],
               noise = e.error[end] + 2.0 * tolerance * std::sqrt(std::max(value, 0.0));
  Tensor gaps = outside(e.lambda, 0) - value;
  gaps = gaps.masked_fill(gaps.abs() <= noise, std::numeric_limits<double>::infinity());
  const double rounding = tolerance / (4.0 * std::sqrt(static_cast<double>(t)));
  Tensor x = e.u.narrow(1, first, m);
  Triplet out;
  for (int step = 0; step < kSteps; ++step) {
    x = x.matmul(ritz_rotation(s.mT().matmul(x), x).to(s.device()));
    const Measured found(s, x);
    const int64_t column = top ? m - 1 : 0;
    const Tensor u = x.select(1, column), sigma = found.sigma[0][column];
    const Tensor within = e.lambda.clamp_min(0.0) + sigma.square();
    Tensor v = found.v.select(1, column), residual = found.residual.select(1, column);
    const Tensor measured = norm(residual);
    for (int turn = 0; turn < kTurns; ++turn) {
      // Parts that are rounding would be blown up by small eigenvalues.
      const Tensor parts = at::hardshrink(e.u.mT().mv(residual), rounding);
      v = v - s.mT().mv(e.u.mv(parts / within));
      v = v / norm(v);
      residual = s.mv(v) - u * sigma;
    }
    const Tensor numbers =
        at::stack({sigma, measured, norm(residual), norm(found.w.select(1, column) - v * sigma)})
            .cpu();
    const double* size = numbers.const_data_ptr<double>();
    const bool plain = size[1] <= tolerance;
    if (plain || std::max(size[2], size[3]) <= tolerance) {
      out.accurate = true;
      out.sigma = size[0];
      out.u = u;
      out.v = plain ? found.v.select(1, column) : v;
      return out;
    }
    const Tensor coefficients = others.mT().matmul(found.residual * found.sigma);
    x = at::addmm(x, others, coefficients / gaps.unsqueeze(1), 1.0, -1.0);
  }
  return out;
}

// Extremes of S; where they are not proven the rest has no meaning.
struct Extremes {
  bool proven = false, has_min = true;
  Triplet max, min;
  int64_t rank = 0, multiplicity_max = 0, multiplicity_min = 0;
};

// How many singular values do not count, -1 where the Gram matrix cannot tell.
inline int64_t missing_by_gram(const Eigenpairs& e, const Policy& policy) {
  const double relative = policy.rank_rtol * policy.rank_rtol;
  return e.count_below(0, e.side(), relative * e.largest(), relative * e.error.back());
}

// s [t, k], t <= k, float64, finite and far from the ends of the range: matrix `number` of a batch,
// of which `look` has the largest and, where it is wanted, the smallest that counts by G. Where the
// smallest is not wanted the rank may be wrong, but is not 0 unless s is.
inline Extremes extremes(
    const Tensor& s,
    Eigenpairs& e,
    const Look& look,
    int64_t number,
    const Policy& policy,
    const Wanted& wanted) {
  const int64_t t = s.size(0);
  const double c = policy.cluster_rtol, units = 4.0 * std::sqrt(static_cast<double>(t + s.size(1)));
  Extremes out;
  if (e.largest() == 0.0 && e.value[0] == 0.0) {
    out.max.u = s.new_zeros({t});
    out.max.v = s.new_zeros({s.size(1)});
    out.multiplicity_max = out.multiplicity_min = policy.full_side;
    out.has_min = false;
    out.proven = true;
    return out;
  }
  if (!(e.largest() > 0.0))  // not a number
    return out;
  const double eps = std::numeric_limits<double>::epsilon(), norm = std::sqrt(e.largest());
  const double tolerance = units * eps * norm;
  const auto proven = [&](const Triplet& first, int64_t end) {
    Triplet x = first.accurate ? first : improved(s, e, end, tolerance);
    const double doubt = e.error[end] + 2.0 * tolerance * x.sigma;
    x.accurate = x.accurate && std::abs(x.sigma * x.sigma - e.value[end]) <= doubt;
    return x;
  };
  out.max = proven(look.triplet(number, 0, tolerance), t - 1);
  if (!out.max.accurate)
    return out;
  // Beside the edge of a cluster, which a measured value gives, refined values are known to tolerance.
  const auto below = [&](int64_t first, int64_t last, double edge) {
    return e.count_below(first, last, edge * edge, 4.0 * edge * tolerance);
  };
  // The extremes themselves are members of their clusters whatever rounding says.
  const double edge = std::max(1.0 - c, 0.0) * out.max.sigma;
  const int64_t apart = below(0, t - 1, edge);
  if (apart < 0)
    return out;
  out.multiplicity_max = t - apart;
  const int64_t by_gram = missing_by_gram(e, policy);
  int64_t missing = std::max<int64_t>(by_gram, 0);
  if (by_gram < 0 && wanted.min)
    missing = resolve_small_end(s, e, policy.rank_rtol * norm, tolerance);
  if (missing < 0)
    return out;
  out.rank = t - missing;
  out.multiplicity_max = std::min(out.multiplicity_max, out.rank);
  out.has_min = wanted.min && !(policy.full_rank && policy.full_side > out.rank);
  if (!out.has_min) {
    out.multiplicity_min = policy.full_side - out.rank;
    out.proven = true;
    return out;
  }
  const auto again = [&] {
    const auto one = [](const Tensor& x) { return x.unsqueeze(0); };
    const Look look(one(s), one(e.lambda), one(e.u), {e}, {missing});
    Triplet x = look.triplet(0, 0, tolerance);
    x.u = look.u[0].select(1, 0);
    x.v = look.v[0].select(1, 0);
    return x;
  };
  out.min = proven(by_gram < 0 ? again() : look.triplet(number, 1, tolerance), missing);
  if (!out.min.accurate)
    return out;
  out.min.sigma = std::min(out.min.sigma, out.max.sigma);
  const double reach = out.min.sigma + c * out.max.sigma;
  int64_t others = below(missing + 1, t, reach);
  if (others < 0) {
    // What G cannot tell apart S can.
    const int64_t b = find_cut(e, t, e.error[missing], reach * reach);
    if (b > 0 && refine(s, e, b, 0.0, tolerance) == Refined::yes)
      others = below(missing + 1, t, reach);
  }
  out.multiplicity_min = others + 1;
  out.proven = out.multiplicity_min > 0;
  return out;
}

}  // namespace immunize_ext::thin_gram
