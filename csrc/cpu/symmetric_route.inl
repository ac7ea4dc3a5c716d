// Algebraic extremes of a symmetric matrix, definite or not. Torch-free.
//
// H = Q T Q^T by Householder reflections, an error of a few eps |H| like that of LAPACK's eigh. The
// extremes of T by Sturm counts, which prove how many eigenvalues lie beyond a point: no start
// vector, nothing to converge. Vectors by twisted factorisation, carried back by Q; the eigenvalues
// returned are Rayleigh quotients of H itself, and |H v - lambda v| is tested against
// 4 max(t, 16) eps |H|.

inline Tridiagonal tridiagonal_of(int64_t t, const double* d, const double* e, double* e_square) {
  for (int64_t i = 0; i + 1 < t; ++i)
    e_square[i] = e[i] * e[i];
  Tridiagonal m{t, d, e, e_square, 0.0, 0.0};
  m.norm = norm_bound(t, d, e);
  m.pivot_min = 1e-30 * m.norm;
  return m;
}

// Extremes of h (t x t, leading dimension ld) from its reduction. scratch: 6 ld. False: not
// accurate.
template <typename Run>
bool extremes_of_reduced(
    const double* h,
    const Reduction& reduction,
    double cluster_rtol,
    double* scratch,
    const Run& run,
    SymmetricPair& out) {
  const int64_t t = reduction.t, ld = reduction.ld;
  const auto take = [&] {
    double* from = scratch;
    scratch += ld;
    return from;
  };
  const Tridiagonal m = tridiagonal_of(t, reduction.d, reduction.e, take());

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

  double *z = take(), *top = take(), *bottom = take(), *x = take();
  double* image = take();
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
    if (!(std::sqrt(residual) <= noise_bound(t, size)))
      return false;
    (c == 0 ? out.lambda_max : out.lambda_min) = quotient;
    std::copy(x, x + t, c == 0 ? out.v_max : out.v_min);
  }
  out.lambda_min = std::min(out.lambda_min, out.lambda_max);
  return true;
}

// h: t x t with leading dimension work.ld(), kept. False: not accurate.
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
      /*work=*/work.take(3 * ld),
      /*two_stages=*/t >= kBandSide};
  reduce(reduction, run);
  return extremes_of_reduced(h, reduction, cluster_rtol, work.take(6 * ld), run, out);
}

// Fills a reference and the extremes from h (t x t, leading dimension ld, kept); t >= 2.
template <typename Run>
bool make_reference(
    const double* h, Reference& r, double cluster_rtol, const Run& run, SymmetricPair& out) {
  std::vector<double> copy(h, h + r.ld * r.ld), scratch(10 * r.ld);
  const Reduction reduction{r.t, r.ld, copy.data(), r.d, r.e, r.v, r.tau, scratch.data()};
  reduce_by_blocks(reduction, run);
  const Tridiagonal m = tridiagonal_of(r.t, r.d, r.e, scratch.data() + 3 * r.ld);
  r.lambda[0] = eigenvalue(m, r.t - 1);
  r.next[0] = eigenvalue(m, r.t - 2);
  r.lambda[1] = eigenvalue(m, 0);
  r.next[1] = eigenvalue(m, 1);
  return extremes_of_reduced(h, reduction, cluster_rtol, scratch.data() + 4 * r.ld, run, out);
}

// Improves x, a unit vector near the extreme `end` of h (t x t, contiguous), with the reference as
// preconditioner: (H_ref - lambda_ref) delta = -(H x - theta x), delta orthogonal to the vector of
// the reference. The error shrinks by about |H - H_ref| / gap a step. Stops where rounding does;
// returns the residual |H x - theta x|, infinite where it fails to shrink.
template <typename Run>
double follow(
    const double* h,
    const Reference& r,
    int end,
    double size,
    const Run& run,
    double* x,
    double& theta) {
  constexpr int steps = 12;
  const int64_t t = r.t, ld = r.ld;
  std::vector<double> memory(6 * ld);
  double *e_square = memory.data(), *top = e_square + ld, *bottom = top + ld, *z = bottom + ld;
  double *image = z + ld, *y = image + ld;
  const Tridiagonal m = tridiagonal_of(t, r.d, r.e, e_square);
  const Reduction q{t, ld, nullptr, r.d, r.e, r.v, r.tau, nullptr};
  const Twist met = twist(m, r.lambda[end], top, bottom);
  eigenvector(m, met, z);
  double before = std::numeric_limits<double>::infinity();
  for (int step = 0; step < steps; ++step) {
    const double* from = x;
    run(t, std::max<int64_t>(1, 100000 / t), [&](int64_t begin, int64_t finish) {
      combine_columns<double, 1>(h, t, begin, finish, &from, &image);
    });
    theta = 0.0;
    for (int64_t i = 0; i < t; ++i)
      theta += x[i] * image[i];
    double residual = 0.0;
    for (int64_t i = 0; i < t; ++i) {
      y[i] = theta * x[i] - image[i];
      residual += y[i] * y[i];
    }
    residual = std::sqrt(residual);
    const bool accurate = residual <= noise_bound(t, size);
    if (residual <= 8.0 * kEps * size || (accurate && residual > 0.5 * before))
      return residual;
    if (!(residual <= 0.5 * before))
      return std::numeric_limits<double>::infinity();
    before = residual;
    std::fill(y + t, y + ld, 0.0);
    apply_q(q, /*transposed=*/true, y);
    correct(m, met, z, y);
    apply_q(q, /*transposed=*/false, y);
    double square = 0.0;
    for (int64_t i = 0; i < t; ++i) {
      x[i] += y[i];
      square += x[i] * x[i];
    }
    const double inverse = 1.0 / std::sqrt(square);
    for (int64_t i = 0; i < t; ++i)
      x[i] *= inverse;
  }
  return before <= noise_bound(t, size) ? before : std::numeric_limits<double>::infinity();
}
