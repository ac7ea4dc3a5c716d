// Extreme singular triplets through the thin Gram matrix, proven or refused. Torch-free.
//
// Let S be the thin side of the matrix (t x k, t <= k), G = S S^T = Q T Q^T. Forming G and reducing
// it commits an error of norm at most `noise` = 4 max(t, 16) eps lambda_max (sums run over blocks
// of 128, so the constant does not grow with k; measured errors are below a tenth of it). Hence
// every eigenvalue is known to noise, and sigma_i = sqrt(lambda_i) to noise / (2 sigma_i): gesdd's
// class near the top, eps sigma_max kappa near the bottom. So three things are not left to G:
//
// 1. Counts. Rank and multiplicities are numbers of eigenvalues beyond a threshold. Each is counted
//    at the threshold plus and minus noise. Where the two agree G decides; where not, it refuses.
//    With the default rank tolerance in float64 the threshold lies below noise, so G decides alone
//    only if lambda_min > noise, that is kappa < (4 max(t, 16) eps)^-1/2: 4e6 at t = 64, 2e6 at
//    t = 256. Beyond that it knows how many singular values certainly count; which of the others do
//    is for the caller to find out, from S.
// 2. Values and vectors. For the thin vector u take w = S^T u, sigma = |w|, v = w / sigma from S
//    itself; the residual r = S v - sigma u makes (sigma, u, v) an exact triplet of S + E with
//    |E| = |r|. It is accepted if |r| <= 4 sqrt(n + p) eps sigma_max: backward stable, as gesdd is.
// 3. Refinement. From T alone |r| is about eps kappa sigma_max. One step of Newton's method with
//    the residual taken from S, (G - lambda) delta = -sigma r, delta orthogonal to u, multiplies
//    the error by noise / gap; three steps are allowed.
//
// Which eigenvalue a triplet belongs to is checked too: |sigma^2 - lambda| <= noise.

// One extreme on the way to its triplet.
struct Candidate {
  double lambda;      // eigenvalue of T
  double *z, *u, *w;  // of T; of G (ld, zero beyond t); S^T u (k)
  double *top, *bottom;
  Twist twist;
  double sigma = 0.0;
  double* residual;  // [ld]
};

inline double norm(const double* x, int64_t length) {
  double square = 0.0;
  for (int64_t i = 0; i < length; ++i)
    square += x[i] * x[i];
  return std::sqrt(square);
}

// to (t) = S v.
template <typename T>
void thin_product_of(const Thin<T>& thin, const double* v, double* to) {
  std::fill(to, to + thin.side(), 0.0);
  if (thin.left())
    combine_columns<T, 1>(thin.a, thin.p, 0, thin.n, &v, &to);
  else
    combine_rows<T, 1>(thin.a, thin.p, 0, thin.n, &v, &to);
}

// to (k) = S^T u.
template <typename T>
void long_product_of(const Thin<T>& thin, const double* u, double* to) {
  std::fill(to, to + thin.length(), 0.0);
  if (thin.left())
    combine_rows<T, 1>(thin.a, thin.p, 0, thin.n, &u, &to);
  else
    combine_columns<T, 1>(thin.a, thin.p, 0, thin.n, &u, &to);
}

// w = S^T u and residual = S v - sigma u for C candidates at once; sigma and v = w / sigma.
template <typename T, int C>
void measure(const Thin<T>& thin, Candidate* const* candidates) {
  const int64_t t = thin.side(), k = thin.length(), p = thin.p;
  const double* u[C];
  const double* w_in[C];
  double *w[C], *s_w[C];
  for (int c = 0; c < C; ++c) {
    u[c] = candidates[c]->u;
    w_in[c] = w[c] = candidates[c]->w;
    s_w[c] = candidates[c]->residual;
    std::fill(w[c], w[c] + k, 0.0);
    std::fill(s_w[c], s_w[c] + t, 0.0);
  }
  if (thin.left()) {
    combine_rows<T, C>(thin.a, p, 0, thin.n, u, w);
    combine_columns<T, C>(thin.a, p, 0, thin.n, w_in, s_w);
  } else {
    // Both products while the rows are in cache: one pass over a tall matrix.
    constexpr int64_t block = 32;
    for (int64_t i = 0; i < thin.n; i += block) {
      const int64_t end = std::min(i + block, thin.n);
      combine_columns<T, C>(thin.a, p, i, end, u, w);
      combine_rows<T, C>(thin.a, p, i, end, w_in, s_w);
    }
  }
  for (int c = 0; c < C; ++c) {
    Candidate& x = *candidates[c];
    x.sigma = norm(x.w, k);
    if (x.sigma == 0.0)
      continue;
    const double inverse = 1.0 / x.sigma;
    for (int64_t i = 0; i < k; ++i)
      x.w[i] *= inverse;
    for (int64_t i = 0; i < t; ++i)
      x.residual[i] = x.residual[i] * inverse - x.sigma * x.u[i];
  }
}

// u <- normalised u + delta, with (T - lambda) Q^T delta = -sigma Q^T residual.
inline void refine_thin(const Reduction& reduction, const Tridiagonal& m, Candidate& x) {
  for (int64_t i = 0; i < m.t; ++i)
    x.residual[i] *= -x.sigma;
  std::fill(x.residual + m.t, x.residual + reduction.ld, 0.0);
  apply_q(reduction, /*transposed=*/true, x.residual);
  correct(m, x.twist, x.z, x.residual);
  apply_q(reduction, /*transposed=*/false, x.residual);
  for (int64_t i = 0; i < m.t; ++i)
    x.u[i] += x.residual[i];
  const double inverse = 1.0 / norm(x.u, m.t);
  for (int64_t i = 0; i < m.t; ++i)
    x.u[i] *= inverse;
}

// v <- normalised v - S^T (G + lambda)^-1 r.
// Returns the larger of |S v - sigma u| and |S^T u - sigma v|.
template <typename T>
double refine_long(
    const Thin<T>& thin,
    const Reduction& reduction,
    const Tridiagonal& m,
    Candidate& x,
    double* scratch,
    double* step) {
  const int64_t t = thin.side(), k = thin.length();
  std::fill(x.residual + t, x.residual + reduction.ld, 0.0);
  apply_q(reduction, /*transposed=*/true, x.residual);
  solve_shifted(m, x.lambda, scratch, x.residual);
  apply_q(reduction, /*transposed=*/false, x.residual);
  long_product_of(thin, x.residual, step);
  const double change = x.sigma * norm(step, k);
  for (int64_t i = 0; i < k; ++i)
    x.w[i] -= step[i];
  const double inverse = 1.0 / norm(x.w, k);
  for (int64_t i = 0; i < k; ++i)
    x.w[i] *= inverse;
  thin_product_of(thin, x.w, x.residual);
  for (int64_t i = 0; i < t; ++i)
    x.residual[i] -= x.sigma * x.u[i];
  return std::max(change, norm(x.residual, t));
}

// Two points without an eigenvalue of T between them, close above what G cannot tell from zero: how
// many eigenvalues lie below, and the middle of the two. False: there are none close by, or too many
// eigenvalues beside them to cost less than a decomposition.
inline bool find_edge(const Tridiagonal& m, double from, SmallEnd& end) {
  constexpr double ratio = 1.3, far = 1e5;
  constexpr int64_t last = kPoints - 1;
  double points[kPoints] = {from};
  int64_t below[kPoints];
  for (int64_t s = 1; s < last; ++s)
    points[s] = ratio * points[s - 1];
  points[last] = far * end.noise;
  count(m, points, below);
  for (int64_t s = 0; s + 1 < last; ++s) {
    if (below[s] != below[s + 1])
      continue;
    end.below = below[s];
    end.edge = 0.5 * (points[s] + points[s + 1]);
    end.block = std::max(below[s], below[last]);
    return end.block == end.below || 2 * end.block <= m.t;
  }
  return false;
}

// Extremes of the matrix whose thin Gram matrix g (leading dimension work.ld(), kept) is given.
// resolve(end): finds out about the singular values that g cannot tell from zero, and fills in the
// vectors of the smallest that counts. False: refused.
template <typename T, typename Run, typename Resolve>
bool extremes(
    const Thin<T>& thin,
    const double* g,
    const Policy& policy,
    Wanted wanted,
    Workspace& work,
    const Run& run,
    const Resolve& resolve,
    Extremes& out) {
  const int64_t t = thin.side(), k = thin.length(), ld = work.ld();
  work.reset();
  double* copy = work.take(ld * ld);
  std::copy(g, g + ld * ld, copy);
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
  double* e_square = work.take(ld);
  for (int64_t i = 0; i + 1 < t; ++i)
    e_square[i] = reduction.e[i] * reduction.e[i];
  Tridiagonal m{t, reduction.d, reduction.e, e_square, 0.0, 0.0};
  m.norm = norm_bound(t, m.d, m.e);
  m.pivot_min = 1e-30 * m.norm;

  const double lambda_max = eigenvalue(m, t - 1);
  const double noise = noise_bound(t, lambda_max);
  const double sigma_max = std::sqrt(lambda_max);
  double points[kPoints] = {};
  int64_t below[kPoints];
  const double rank_threshold = policy.rank_rtol * policy.rank_rtol * lambda_max;
  const double max_threshold =
      lambda_max * (1.0 - policy.cluster_rtol) * (1.0 - policy.cluster_rtol);
  points[0] = rank_threshold - noise;
  points[1] = rank_threshold + noise;
  points[2] = max_threshold - noise;
  points[3] = max_threshold + noise;
  count(m, points, below);
  // The extreme itself belongs to its cluster, wherever its own rounding puts it.
  const int64_t most = std::max<int64_t>(1, t - below[2]);
  if (wanted.max && most != std::max<int64_t>(1, t - below[3]))
    return false;
  int64_t missing = 0;
  SmallEnd end;
  if (wanted.min && below[1] > 0) {
    missing = below[1];
    if (rank_threshold > 4.0 * noise) {
      if (below[0] != missing)
        return false;
    } else {
      end.noise = noise;
      end.sigma_max = sigma_max;
      if (!find_edge(m, rank_threshold + 8.0 * noise, end) || !resolve(end))
        return false;
      missing = end.missing;
    }
  }
  out.rank = t - missing;
  out.multiplicity_max = std::min(most, out.rank);
  const bool has_min = wanted.min && !(policy.full_rank && out.rank < policy.full_side);
  out.multiplicity_min = policy.full_side - out.rank;
  const bool from_gram = has_min && end.sigma == 0.0;
  double lambda_min = 0.0;
  if (has_min && !from_gram)
    out.multiplicity_min = end.multiplicity;
  if (from_gram) {
    lambda_min = eigenvalue(m, missing);
    const double edge = std::sqrt(std::max(lambda_min, 0.0)) + policy.cluster_rtol * sigma_max;
    points[0] = edge * edge - 2.0 * noise;
    points[1] = edge * edge + 2.0 * noise;
    count(m, points, below);
    const int64_t least = std::max<int64_t>(1, below[1] - missing);
    if (least != std::max<int64_t>(1, below[0] - missing))
      return false;
    out.multiplicity_min = least;
  }

  Candidate pair[2];
  Candidate* chosen[2];
  int count = 0;
  for (int c = 0; c < 2; ++c) {
    Candidate& x = pair[c];
    x.lambda = c == 0 ? lambda_max : lambda_min;
    if (c == 0 ? !wanted.max : !from_gram)
      continue;
    x.z = work.take(ld);
    x.u = work.take(ld);
    x.top = work.take(ld);
    x.bottom = work.take(ld);
    x.residual = work.take(ld);
    x.w = work.take(k);
    x.twist = twist(m, x.lambda, x.top, x.bottom);
    if (!(eigenvector(m, x.twist, x.z) <= noise))
      return false;
    std::copy(x.z, x.z + t, x.u);
    std::fill(x.u + t, x.u + ld, 0.0);
    apply_q(reduction, /*transposed=*/false, x.u);
    // At the top |r| <= 2 noise / sigma_max already: nothing to measure but the long vector.
    x.sigma = std::sqrt(std::max(x.lambda, 0.0));
    if (c == 1 || wanted.long_vectors)
      chosen[count++] = &x;
  }
  if (count == 2)
    measure<T, 2>(thin, chosen);
  else if (count == 1)
    measure<T, 1>(thin, chosen);
  double *scratch = work.take(ld), *long_step = work.take(k);
  const double tolerance = 4.0 * std::sqrt(static_cast<double>(thin.n + thin.p)) * kEps * sigma_max;
  for (int c = 0; c < count; ++c) {
    Candidate& x = *chosen[c];
    double error = norm(x.residual, t);
    for (int step = 0; step < kRefinements && error > tolerance; ++step) {
      if (step > 0)
        measure<T, 1>(thin, chosen + c);
      refine_thin(reduction, m, x);
      measure<T, 1>(thin, chosen + c);
      error = norm(x.residual, t);
      if (error > tolerance)
        error = refine_long(thin, reduction, m, x, scratch, long_step);
    }
    // Not >, or a NaN would pass.
    if (!(error <= tolerance) || !(std::abs(x.sigma * x.sigma - x.lambda) <= noise))
      return false;
  }

  out.sigma_max = wanted.max ? pair[0].sigma : sigma_max;
  out.sigma_min = has_min ? std::min(from_gram ? pair[1].sigma : end.sigma, out.sigma_max) : 0.0;
  if (wanted.max)
    std::copy(pair[0].u, pair[0].u + t, out.thin_max);
  if (from_gram)
    std::copy(pair[1].u, pair[1].u + t, out.thin_min);
  if (wanted.max && wanted.long_vectors)
    std::copy(pair[0].w, pair[0].w + k, out.long_max);
  if (from_gram && wanted.long_vectors)
    std::copy(pair[1].w, pair[1].w + k, out.long_min);
  return true;
}
