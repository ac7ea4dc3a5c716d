// Algebraic extremes of a symmetric matrix, definite or not. Torch-free.
//
// H = Q T Q^T by Householder reflections, an error of a few eps |H| like that of LAPACK's eigh. The
// extremes of T by Sturm counts, which prove how many eigenvalues lie beyond a point: no start
// vector, nothing to converge. Vectors by twisted factorisation, carried back by Q; the eigenvalues
// returned are Rayleigh quotients of H itself, and |H v - lambda v| is tested against
// 4 max(t, 16) eps |H|.

// g: t x t with leading dimension ld, as for reduce(); h: the same, kept. False: not accurate.
template <typename Run>
bool symmetric_extremes(
    const double* h,
    int64_t t,
    double cluster_rtol,
    Workspace& work,
    const Run& run,
    SymmetricPair& out) {
  const int64_t ld = work.ld();
  work.reset();
  double* copy = work.take(ld * ld);
  std::copy(h, h + ld * ld, copy);
  const Reduction reduction{
      t,
      ld,
      copy,
      /*d=*/work.take(ld),
      /*e=*/work.take(ld),
      /*v=*/work.take(ld * ld),
      /*tau=*/work.take(ld),
      /*work=*/work.take(3 * ld)};
  reduce(reduction, run);
  double* e_square = work.take(ld);
  for (int64_t i = 0; i + 1 < t; ++i)
    e_square[i] = reduction.e[i] * reduction.e[i];
  Tridiagonal m{t, reduction.d, reduction.e, e_square, 0.0, 0.0};
  m.norm = norm_bound(t, m.d, m.e);
  m.pivot_min = 1e-30 * m.norm;

  const double lambda[2] = {eigenvalue(m, t - 1), t > 1 ? eigenvalue(m, 0) : m.d[0]};
  const double size = std::max(std::abs(lambda[0]), std::abs(lambda[1]));
  double points[kPoints] = {};
  int64_t below[kPoints];
  points[0] = lambda[0] - cluster_rtol * size;
  points[1] = lambda[1] + cluster_rtol * size;
  count(m, points, below);
  // The extreme itself belongs to its cluster, wherever its own rounding puts it.
  out.multiplicity_max = std::max<int64_t>(1, t - below[0]);
  out.multiplicity_min = std::max<int64_t>(1, below[1]);

  double *z = work.take(ld), *top = work.take(ld), *bottom = work.take(ld), *x = work.take(ld);
  double* image = work.take(ld);
  for (int c = 0; c < 2; ++c) {
    const Twist met = twist(m, lambda[c], top, bottom);
    eigenvector(m, met, z);
    std::copy(z, z + t, x);
    std::fill(x + t, x + ld, 0.0);
    apply_q(reduction, /*transposed=*/false, x);
    const double* from = x;
    run(t, std::max<int64_t>(1, 100000 / t), [&](int64_t begin, int64_t end) {
      combine_columns<double, 1>(h, ld, begin, end, &from, &image);
    });
    double quotient = 0.0, square = 0.0;
    for (int64_t i = 0; i < t; ++i) {
      quotient += x[i] * image[i];
      square += x[i] * x[i];
    }
    quotient /= square;
    double residual = 0.0;
    for (int64_t i = 0; i < t; ++i) {
      const double r = image[i] - quotient * x[i];
      residual += r * r;
    }
    // Not >, or a NaN would pass.
    if (!(std::sqrt(residual) <= noise_of(t, size)))
      return false;
    (c == 0 ? out.lambda_max : out.lambda_min) = quotient;
    std::copy(x, x + t, c == 0 ? out.v_max : out.v_min);
  }
  out.lambda_min = std::min(out.lambda_min, out.lambda_max);
  return true;
}
