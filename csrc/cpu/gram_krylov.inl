// Extreme singular triplets of a large matrix: the ends of its thin Gram matrix by Krylov spaces
// (krylov.inl), the triplets from the matrix itself (gram_route.inl). Torch-free.
//
// What is left to G is what gram_route.inl leaves to it: which eigenvalues there are, up to noise.
// All of them have to lie beyond the rank threshold here, and the extremes have to stand alone;
// null spaces and clusters are refused, for a reduction or a decomposition to settle.
//
// The smallest one is refined with the matrix S. Let the rows of X span the 12 last thin vectors.
// Then W = X S is formed without squaring a condition number, Ritz vectors of S S^T follow from the
// 12 x 12 matrix W W^T, and with sigma = |w|, v = w / sigma, the residual r = S v - sigma u tells
// how far (sigma, u, v) is from a triplet. With F = (G - tau)^-1, of which the factor that proved
// the end is at hand,
//   u <- u - F sigma r    multiplies the error of u by (lambda - tau) / (lambda_13 - tau),
//   v <- v - S^T (F (r - X^T X r) + sum_i x_i (x_i . r) / (sigma_i^2 + sigma^2))
// takes back what rounding in w, eps kappa, did to v. Rounding in G touches F alone. The second is
// Newton's step with (G + lambda)^-1 (gram_route.inl): off the span of X F is near enough to that,
// and along X, where F may be large, S^T x_i = sigma_i v_i is known.

// rows [12, t] of length side -> images [12, k] = rows S.
template <typename T, typename Run>
void thin_images(
    const Thin<T>& thin, const double* rows, int64_t side, const Run& run, double* images) {
  const int64_t k = thin.length();
  constexpr int64_t block = 4;
  if (thin.left()) {
    // Sums over rows of the matrix: each thread takes a block of the vectors.
    run(kPanel / block, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * block; c < end * block; c += block) {
        const double* from[block];
        double* to[block];
        for (int64_t q = 0; q < block; ++q) {
          from[q] = rows + (c + q) * side;
          to[q] = images + (c + q) * k;
          std::fill(to[q], to[q] + k, 0.0);
        }
        combine_rows<T, block>(thin.a, thin.p, 0, thin.n, from, to);
      }
    });
    return;
  }
  run(thin.n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c < kPanel; c += block) {
      const double* from[block];
      double* to[block];
      for (int64_t q = 0; q < block; ++q) {
        from[q] = rows + (c + q) * side;
        to[q] = images + (c + q) * k;
      }
      combine_columns<T, block>(thin.a, thin.p, begin, end, from, to);
    }
  });
}

// The rows of the bottom end and their images become Ritz vectors of S S^T, the smallest first.
// False: no convergence of the small problem.
inline bool rotate_to_ritz(int64_t side, int64_t k, std::vector<double>& rows, double* images) {
  constexpr int64_t m = kPanel;
  double small[m * m], vectors[m * m], values[m];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j <= i; ++j)
      small[i * m + j] = small[j * m + i] = dot(images + i * k, images + j * k, k);
  if (!small_eigen(small, m, values, vectors))
    return false;
  int64_t order[m];
  for (int64_t i = 0; i < m; ++i)
    order[i] = i;
  std::sort(order, order + m, [&](int64_t i, int64_t j) { return values[i] < values[j]; });
  const std::vector<double> old_rows = rows, old_images(images, images + m * k);
  std::fill(rows.begin(), rows.end(), 0.0);
  std::fill(images, images + m * k, 0.0);
  for (int64_t c = 0; c < m; ++c) {
    const double* weights = vectors + order[c] * m;
    double *row = rows.data() + c * side, *image = images + c * k;
    combine_rows<double, 1>(old_rows.data(), side, 0, m, &weights, &row);
    combine_rows<double, 1>(old_images.data(), k, 0, m, &weights, &image);
  }
  return true;
}

// v, a unit vector of length k, loses what rounding did to it. images: the v_i, sigmas: sigma_i of
// the vectors of X. Returns the larger of |S v - sigma u| and |S^T u - sigma v|. panel: scratch,
// [2, side, 12]; residual: [side], lost.
template <typename T, typename Run>
double refine_long_vector(
    const Thin<T>& thin,
    int64_t side,
    const double* sigmas,
    const double* images,
    const double* m,
    const Deflated& d,
    const Run& run,
    const End& end,
    double* residual,
    double* panel,
    double* v) {
  const int64_t t = thin.side(), k = thin.length(), block = kPanel * side;
  const double sigma = sigmas[0];
  double weights[kPanel];
  for (int64_t c = 0; c < kPanel; ++c) {
    const double* x = end.rows.data() + c * side;
    const double along = dot(x, residual, side);
    for (int64_t i = 0; i < side; ++i)
      residual[i] -= along * x[i];
    // Along u itself only the length of v would change.
    weights[c] = c == 0 ? 0.0 : along * sigmas[c] / (sigmas[c] * sigmas[c] + sigma * sigma);
  }
  double *in = panel, *out = panel + block;
  std::fill(in, in + block, 0.0);
  for (int64_t i = 0; i < t; ++i)
    in[i * kPanel] = residual[i];
  apply_deflated(m, d, side, in, out, run);
  std::vector<double> solved(side), step(k);
  for (int64_t i = 0; i < side; ++i)
    solved[i] = end.sign * out[i * kPanel];
  long_product_of(thin, solved.data(), step.data());
  const double* from = weights;
  double* to = step.data();
  combine_rows<double, 1>(images, k, 0, kPanel, &from, &to);
  for (int64_t i = 0; i < k; ++i)
    v[i] -= step[i];
  const double inverse = 1.0 / norm(v, k);
  for (int64_t i = 0; i < k; ++i)
    v[i] *= inverse;
  thin_product_of(thin, v, residual);
  for (int64_t i = 0; i < t; ++i)
    residual[i] -= sigma * end.rows[i];
  return std::max(sigma * norm(step.data(), k), norm(residual, t));
}

// sigma, u = end.rows[0] and v = images[0] of the smallest triplet; end and (m, d) as converge left
// them, m and d lost. size: of G. False: not accurate.
template <typename T, typename Run>
bool refine_smallest(
    const Thin<T>& thin,
    int64_t side,
    double tolerance,
    const double* g,
    double size,
    double* m,
    Deflated& d,
    const Run& run,
    End& end,
    double* images,
    double& sigma) {
  constexpr int most_steps = 8, patience = 2;
  const int64_t t = thin.side(), k = thin.length(), block = kPanel * side;
  std::vector<double> memory(3 * block), residual(side), v(k);
  double *residuals = memory.data(), *in = residuals + block, *out = in + block;
  for (int step = 0; step < most_steps; ++step) {
    thin_images(thin, end.rows.data(), side, run, images);
    if (!rotate_to_ritz(side, k, end.rows, images))
      return false;
    std::fill(residuals, residuals + block, 0.0);
    double sigmas[kPanel];
    for (int64_t c = 0; c < kPanel; ++c) {
      double* w = images + c * k;
      sigmas[c] = norm(w, k);
      if (!(sigmas[c] > 0.0))
        return false;
      for (int64_t i = 0; i < k; ++i)
        w[i] /= sigmas[c];
    }
    sigma = sigmas[0];
    for (int64_t c = 0; c < std::max<int64_t>(1, d.above); ++c) {
      const double *u = end.rows.data() + c * side, *w = images + c * k;
      double* r = residuals + c * side;
      thin_product_of(thin, w, r);
      for (int64_t i = 0; i < t; ++i)
        r[i] -= sigmas[c] * u[i];
      if (c == 0) {
        if (norm(r, t) <= tolerance)
          return true;
        std::copy(r, r + side, residual.data());
        std::copy(w, w + k, v.data());
        const double error = refine_long_vector(
            thin, side, sigmas, images, m, d, run, end, residual.data(), in, v.data());
        if (error <= tolerance) {
          std::copy(v.begin(), v.end(), images);
          return true;
        }
      }
      for (int64_t i = 0; i < t; ++i)
        r[i] *= end.sign * sigmas[c];
    }
    if (step == patience) {
      // tau half way to the next eigenvalue proves well and refines slowly: one close to the end.
      const double near = std::max(0.02 * (end.theta[0] - d.tau), 4.0 * noise_bound(t, size));
      if (!deflate(g, t, side, size, end.theta[0] - near, end, run, m, d))
        return false;
    }
    to_panel(residuals, side, in);
    apply_deflated(m, d, side, in, out, run);
    from_panel(out, side, residuals);
    for (int64_t i = 0; i < block; ++i)
      end.rows[i] -= residuals[i];
    append(nullptr, 0, t, side, end.rows.data(), in, nullptr);
  }
  return false;
}

// How many of the proven eigenvalues form the extreme, if rounding leaves no doubt; else 0.
inline int64_t count_near(const End& end, double near, double noise) {
  int64_t count = 1;
  for (int64_t i = 1; i < end.above; ++i) {
    const double distance = end.theta[0] - end.theta[i];
    if (distance > near + 2.0 * noise)
      break;
    if (!(distance <= near - 2.0 * noise))
      return 0;
    ++count;
  }
  return count;
}

// As extremes() of gram_route.inl, for large sides.
template <typename T, typename Run>
bool large_extremes(
    const Thin<T>& thin,
    const double* g,
    const Policy& policy,
    Wanted wanted,
    const Run& run,
    Extremes& out) {
  const int64_t t = thin.side(), k = thin.length(), side = padded(t);
  End ends[2];
  if (!start_ends(g, t, side, run, ends))
    return false;
  std::vector<double> m(side * side);
  Deflated d;
  const double c = policy.cluster_rtol;
  // In units of the eigenvalues: what lies within c sigma_max of sigma_max.
  const auto near_top = [c](double lambda) { return lambda * c * (2.0 - std::min(c, 1.0)); };
  // 1.5: what the first estimate of lambda_max may lack.
  double size = ends[0].theta[0];
  double near = 1.5 * near_top(size) + 2.0 * noise_bound(t, size);
  if (!(size > 0.0) || !converge(g, t, side, size, near, run, m.data(), d, ends[0]))
    return false;
  size = ends[0].theta[0];
  const double noise = noise_bound(t, size), sigma_max = std::sqrt(size);
  out.multiplicity_max = 1;
  if (wanted.max) {
    near = near_top(size);
    out.multiplicity_max = count_near(ends[0], near, noise);
    if (out.multiplicity_max == 0 || !(size - ends[0].tau > near + 2.0 * noise))
      return false;
  }
  out.rank = t;
  const bool has_min = wanted.min && !(policy.full_rank && t < policy.full_side);
  out.multiplicity_min = policy.full_side - t;  // of the value zero, if there is no other
  double sigma_min = 0.0;
  std::vector<double> images;
  if (wanted.min) {
    const auto near_bottom = [&](double lambda) {
      return c * sigma_max * (2.0 * std::sqrt(std::max(lambda, 0.0)) + c * sigma_max);
    };
    near = near_bottom(-ends[1].theta[0]) + 2.0 * noise;
    if (!converge(g, t, side, size, near, run, m.data(), d, ends[1]))
      return false;
    const double lambda_min = -ends[1].theta[0];
    const double rank_threshold = policy.rank_rtol * policy.rank_rtol * size;
    if (!(lambda_min > rank_threshold + 2.0 * noise))
      return false;
    near = near_bottom(lambda_min);
    const int64_t least = count_near(ends[1], near, 2.0 * noise);
    if (least == 0 || !(ends[1].theta[0] - ends[1].tau > near + 4.0 * noise))
      return false;
    if (has_min) {
      out.multiplicity_min = least;
      images.resize(kPanel * k);
      const double tolerance =
          4.0 * std::sqrt(static_cast<double>(thin.n + thin.p)) * kEps * sigma_max;
      if (!refine_smallest(
              thin, side, tolerance, g, size, m.data(), d, run, ends[1], images.data(),
              sigma_min) ||
          !(std::abs(sigma_min * sigma_min - lambda_min) <= noise))
        return false;
      std::copy(ends[1].rows.data(), ends[1].rows.data() + t, out.thin_min);
      if (wanted.long_vectors)
        std::copy(images.data(), images.data() + k, out.long_min);
    }
  }
  out.sigma_max = sigma_max;
  if (wanted.max) {
    std::copy(ends[0].rows.data(), ends[0].rows.data() + t, out.thin_max);
    if (wanted.long_vectors) {
      // One vector of the 12 is wanted; the others cost little beside the Gram matrix.
      images.resize(kPanel * k);
      thin_images(thin, ends[0].rows.data(), side, run, images.data());
      out.sigma_max = norm(images.data(), k);
      for (int64_t i = 0; i < k; ++i)
        out.long_max[i] = images[i] / out.sigma_max;
    }
  }
  out.sigma_min = has_min ? std::min(sigma_min, out.sigma_max) : 0.0;
  return true;
}
