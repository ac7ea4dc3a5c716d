// The part of a merge that all layers share, from Z = L^-1 C^T and the pivots of T on: library
// calls alone, once for all devices. Shapes are [batch, ...].
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "merge_problem.h"

namespace immunize_ext {

// Cholesky factorisation of T with pivots: T = L L^T in the rows and columns order[0 .. rank), and
// what is left of the others is below the tolerance.
struct Pivoted {
  at::Tensor triangle;  // [batch, s, s], L, continued by the identity
  at::Tensor order;     // [batch, s] int64, rows that are kept, then the others
  at::Tensor rank;      // [batch] int64
};

// T = Z'^T Z' for Z' = [ Z; diag(1 / mu)^(1/2) ], of the rows that are kept Z' = Q R. The root
// H = R^-1 of E = H H^T and the upper part of Q give B = H (L^-T Q)^T. R = L^T of T, a Gram matrix,
// has lost twice the digits of the angles between tokens; orthonormalising Q once more
// (CholeskyQR2, here with a symmetric second factor) brings them back, provided that Q comes from
// Z' by substitution and H from solving H R = I row by row: then H R - I is of the order eps |H|
// |R|, and constraints are met as far as their size allows.
//
// Averaging: E = T^+, which meets repeated constraints in the least-squares sense. T = K K^T with
// K = T H of full column rank, so T^+ = K^+T K^+ and its root is K^+T.
//
// Returns root [batch, s, s], zero from column `rank` on, basis [batch, d, s] = Z root, and
// defect = I - E T, with exact zeros where T has full rank and, unless averaging, in the columns of
// rows that were kept.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> solve_constraints(
    const SolveProblem& p,
    const at::Tensor& z,  // [batch, d, s]
    const at::Tensor& t,  // [batch, s, s]
    const Pivoted& v,
    bool average) {
  const at::Tensor identity = at::eye(p.s, t.options());
  const at::Tensor kept =
      at::arange(p.s, v.rank.options()).lt(v.rank.unsqueeze(-1)).to(t.options());  // in order
  const at::Tensor stacked = at::cat({z, at::diag_embed(p.inverse_hardness.sqrt())}, 1);
  const at::Tensor columns =
      stacked.gather(2, v.order.unsqueeze(1).expand(stacked.sizes())) * kept.unsqueeze(1);
  const at::Tensor first = at::linalg_solve_triangular(v.triangle, columns.mT(), /*upper=*/false);
  const at::Tensor gram = first.matmul(first.mT()) + at::diag_embed(1.0 - kept);
  // gram^(-1/2) by Newton and Schulz: gram is within 1e-3 of I, and each step squares that. No
  // library call, since LAPACK's Cholesky never ends in a process that was forked after threads
  // ran.
  at::Tensor correction = 1.5 * identity - 0.5 * gram;
  for (int step = 0; step < 2; ++step)
    correction =
        1.5 * correction - 0.5 * correction.matmul(correction).matmul(correction.matmul(gram));
  const at::Tensor q = correction.matmul(first);
  const at::Tensor inverse = correction.matmul(
      at::linalg_solve_triangular(v.triangle, identity * kept.unsqueeze(-1), /*upper=*/false));
  const at::Tensor rows = v.order.unsqueeze(-1).expand(t.sizes());
  at::Tensor root = at::zeros_like(t).scatter(1, rows, inverse.mT());
  at::Tensor basis = q.narrow(2, 0, p.d).mT();
  at::Tensor missing = at::ones_like(kept).scatter(1, v.order, 1.0 - kept).unsqueeze(-2);
  if (average && v.rank.lt(p.s).any().item<bool>()) {
    const at::Tensor singular = v.rank.lt(p.s).view({p.batch, 1, 1});
    const at::Tensor averaging = at::linalg_pinv(t.matmul(root)).mT();
    root = at::where(singular, averaging, root);
    basis = at::where(singular, z.matmul(averaging), basis);
    missing = singular.to(t.options());
  }
  const at::Tensor defect = (identity - root.matmul(root.mT().matmul(t))) * missing;
  return {root.contiguous(), basis.contiguous(), defect.contiguous()};
}

// S F = L^-T (I - Z H (Z H)^T) L^-1 F, of solve(X, transposed) = L^-1 X or L^-T X.
template <typename Solve>
at::Tensor solve_free(
    const at::Tensor& f,      // [*, d, k]
    const at::Tensor& basis,  // [*, d, s], Z H
    const Solve& solve) {
  const at::Tensor v = solve(f, false);
  return solve(v - basis.matmul(basis.mT().matmul(v)), true).contiguous();
}

}  // namespace immunize_ext
