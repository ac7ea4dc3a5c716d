// Every operator schema of immunize_ext, in one place.
//
// Symbols: * leading batch dimensions; n x p a matrix (for features: n samples, p features);
//          t = min(n, p) its thin side; d input width, o output width of a projection;
//          s concept rows (tokens) over all concepts; L layers; N concepts.
// Kernels live in cpu/<stem>.cpp and cuda/<stem>.cpp, each with its own TORCH_LIBRARY_IMPL block;
// fake kernels and transform rules live in immunize_ext/ops/_register.py.

#include <torch/library.h>

TORCH_LIBRARY(immunize_ext, m) {
  // --- spectrum ---------------------------------------------------------------------------------
  // Policy arguments, the same in every spectrum operator:
  //   rank_rtol     sigma_i counts iff sigma_i > rank_rtol * sigma_max
  //   cluster_rtol  sigma_i belongs to an extreme iff it is within cluster_rtol * sigma_max of it
  //   full_rank     sigma_min is the t-th singular value (0 if it does not count), not the rank-th
  m.def(
      "extremal_singular_values(Tensor a,"  // [*, n, p]
      " float rank_rtol, float cluster_rtol, bool full_rank) -> ("
      "Tensor sigma_max,"          // [*] float64
      " Tensor sigma_min,"         // [*] float64
      " Tensor rank,"              // [*] int64
      " Tensor multiplicity_max,"  // [*] int64
      " Tensor multiplicity_min,"  // [*] int64
      " Tensor u_max,"             // [*, n] float64, zero where the gradient is zero
      " Tensor v_max,"             // [*, p] float64
      " Tensor u_min,"             // [*, n] float64
      " Tensor v_min)");           // [*, p] float64
  m.def(
      "extremal_singular_values_backward("
      "Tensor grad_max,"   // [*] float64
      " Tensor grad_min,"  // [*] float64
      " Tensor a, Tensor multiplicity_max, Tensor multiplicity_min,"
      " Tensor u_max, Tensor v_max, Tensor u_min, Tensor v_min,"
      " float rank_rtol, float cluster_rtol, bool full_rank) -> Tensor");  // [*, n, p], dtype of a
  m.def(
      "extremal_singular_values_double_backward("
      "Tensor cotangent,"  // [*, n, p], with respect to grad_a
      " Tensor grad_max, Tensor grad_min, Tensor a,"
      " float rank_rtol, float cluster_rtol, bool full_rank) -> ("
      "Tensor grad_grad_max, Tensor grad_grad_min, Tensor grad_a)");
  // Extremes of K = x^T x, in units of K; tolerances stay in units of the singular values of x.
  m.def(
      "gram_extremes(Tensor x,"  // [*, n, p]
      " float rank_rtol, float cluster_rtol, bool full_rank) -> ("
      "Tensor lambda_max,"                                               // [*] float64
      " Tensor lambda_min,"                                              // [*] float64
      " Tensor squared_frobenius,"                                       // [*] float64, |K|_F^2
      " Tensor rank, Tensor multiplicity_max, Tensor multiplicity_min,"  // [*] int64
      " Tensor u_max, Tensor v_max, Tensor u_min, Tensor v_min,"         // as above
      " Tensor thin_gram)");  // [*, t, t] float64, x x^T or x^T x
  m.def(
      "gram_extremes_backward("
      "Tensor grad_max, Tensor grad_min, Tensor grad_squared_frobenius,"  // [*] float64
      " Tensor x, Tensor lambda_max, Tensor lambda_min,"
      " Tensor multiplicity_max, Tensor multiplicity_min,"
      " Tensor u_max, Tensor v_max, Tensor u_min, Tensor v_min, Tensor thin_gram,"
      " float rank_rtol, float cluster_rtol, bool full_rank) -> Tensor");  // [*, n, p], dtype of x
  m.def(
      "gram_extremes_double_backward("
      "Tensor cotangent,"  // [*, n, p], with respect to grad_x
      " Tensor grad_max, Tensor grad_min, Tensor grad_squared_frobenius, Tensor x,"
      " float rank_rtol, float cluster_rtol, bool full_rank) -> ("
      "Tensor grad_grad_max, Tensor grad_grad_min, Tensor grad_grad_squared_frobenius,"
      " Tensor grad_x)");

  // R_well (ill = false) or R_ill of K = x^T x; normaliser: p or k, by default the width of x or
  // the rank; floor: of the denominator of R_ill.
  m.def(
      "gram_regularizer(Tensor x,"  // [*, n, p]
      " bool ill, float? normaliser, float? floor,"
      " float rank_rtol, float cluster_rtol, bool full_rank) -> ("
      "Tensor value,"          // [*], dtype of x
      " Tensor coefficients,"  // [*, 3] float64: of d lambda_max, d lambda_min, d |K|_F^2
      " Tensor multiplicity,"  // [*] int64, of the extreme that enters
      " Tensor thin_vector,"   // [*, t] float64, its vector on the thin side
      " Tensor thin_gram)");   // [*, t, t] float64
  m.def(
      "gram_regularizer_backward("
      "Tensor grad,"  // [*], dtype of x
      " Tensor x, Tensor coefficients, Tensor multiplicity, Tensor thin_vector, Tensor thin_gram,"
      " bool ill, float? normaliser,"
      " float rank_rtol, float cluster_rtol, bool full_rank) -> Tensor");  // [*, n, p]

  // Algebraic extremes of symmetric matrices, possibly indefinite.
  m.def(
      "symmetric_extremes(Tensor h, float cluster_rtol) -> ("  // [*, p, p]
      "Tensor lambda_max, Tensor lambda_min,"                  // [*] float64
      " Tensor multiplicity_max, Tensor multiplicity_min,"     // [*] int64
      " Tensor v_max, Tensor v_min)");                         // [*, p] float64
  m.def(
      "symmetric_extremes_backward("
      "Tensor grad_max, Tensor grad_min,"  // [*] float64
      " Tensor h, Tensor multiplicity_max, Tensor multiplicity_min, Tensor v_max, Tensor v_min,"
      " float cluster_rtol) -> Tensor");  // [*, p, p], dtype of h
  m.def(
      "symmetric_extremes_double_backward("
      "Tensor cotangent,"  // [*, p, p], with respect to grad_h
      " Tensor grad_max, Tensor grad_min, Tensor h, float cluster_rtol) -> ("
      "Tensor grad_grad_max, Tensor grad_grad_min, Tensor grad_h)");

  // A trajectory of symmetric matrices: what a cold call leaves behind, and a warm call. ok =
  // false: not converged or not proven, take a cold call.
  m.def(
      "symmetric_reference(Tensor h, float cluster_rtol) -> ("  // [p, p]
      "Tensor values,"         // [2] float64: lambda_max, lambda_min
      " Tensor multiplicity,"  // [2] int64
      " Tensor vectors,"       // [2, p] float64
      " Tensor matrix,"        // [p, p] float64, exactly symmetric
      " Tensor reflectors,"    // [p, ld] float64
      " Tensor tridiagonal,"   // [3, ld] float64: diagonal, off-diagonal, reflector factors
      " Tensor ends)");  // [5] float64: top, the value beside it, bottom, the value beside it,
                         // scale
  m.def(
      "symmetric_track(Tensor h, float cluster_rtol,"  // [p, p]
      " Tensor vectors, Tensor matrix, Tensor reflectors, Tensor tridiagonal, Tensor ends) -> ("
      "Tensor values, Tensor new_vectors, bool ok)");

  // --- merge ------------------------------------------------------------------------------------
  // Q without ridge: c_reg^T c_reg, symmetric to the bit.
  m.def(
      "merge_gram(Tensor c_reg,"               // [m, d]
      " int chunk=512) -> Tensor");  // rows widened at a time without a kernel -> [d, d] float64
  // The part shared by all layers. T = c Q^-1 c^T + diag(inverse_hardness), E its (generalised)
  // inverse, b = E c Q^-1, Q = chol chol^T.
  m.def(
      "merge_solve("
      "Tensor chol,"               // [*, d, d] float64, lower Cholesky factor of Q
      " Tensor c,"                 // [*, s, d] float64
      " Tensor inverse_hardness,"  // [*, s] float64, 0 = hard constraint
      " float rank_rtol, bool average) -> ("
      "Tensor b,"        // [*, s, d]
      " Tensor root,"    // [*, s, s], E = root root^T; zero from column `rank` on
      " Tensor basis,"   // [*, d, s] = chol^-1 c^T root
      " Tensor defect,"  // [*, s, s] = I - E T, zero where T has full rank
      " Tensor rank)");  // [*] int64, -1 where chol, c or T is not finite
  // The part per layer: W_l = W0_l + R_l b with R_l = V_l - W0_l c^T.
  // targets: concept weights, concept-major (N * L tensors [*, o_l, d]) with rows[n] tokens each;
  //          or, with targets_are_values, one [*, o_l, s] tensor a layer.
  m.def(
      "merge_apply("
      "Tensor[] base,"  // L x [*, o_l, d]
      " Tensor[] targets, int[] rows, bool targets_are_values,"
      " Tensor c, Tensor b) -> ("  // [*, s, d] float64
      "Tensor[] merged,"           // L x [*, o_l, d], dtype of base
      " Tensor[] residual,"        // L x [*, o_l, s], float32 or float64
      " Tensor status)");          // [*, L] int32: 0, or 1 R not finite, 2 merged not finite
  m.def(
      "merge_apply_backward("
      "Tensor[] grad,"  // L x [*, o_l, d]
      " Tensor[] base, Tensor[] targets, int[] rows, bool targets_are_values,"
      " Tensor c, Tensor b, Tensor[] residual,"
      " bool need_base, bool need_targets, bool need_c, bool need_b) -> ("
      "Tensor[] grad_base, Tensor[] grad_targets,"  // empty lists where not needed
      " Tensor grad_c, Tensor grad_b)");            // [0] where not needed

  // --- precondition -----------------------------------------------------------------------------
  // grad K^-1 for K = x^T x + ridge I, from the Cholesky factor of K (p x p), or with woodbury from
  // that of x x^T + ridge I (n x n) and x.
  m.def(
      "precondition("
      "Tensor grad,"                              // [*, o, p]
      " Tensor factor,"                           // [p, p] or [n, n] float64, lower
      " Tensor x,"                                // [n, p] float64; [0, p] unless woodbury
      " float ridge, bool woodbury) -> Tensor");  // [*, o, p], dtype of grad
}
