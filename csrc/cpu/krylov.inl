// Extremes of a large symmetric matrix by block Krylov spaces, found and then proven. Torch-free.
//
// A reduction to tridiagonal form costs 4/3 t^3 operations, half of them bound by memory. Here the
// matrix is only multiplied with panels of 12 vectors and factorised a few times, at t^3 / 3 each:
//
// 1. Search. A block Krylov space of H from a fixed start gives both ends roughly. Then, an end at
//    a time with s = +-1 making it the top, spaces of the inverse of s H - tau with tau close to
//    the end, which is what dominates there. 12 vectors converge by the gap to those beyond them.
// 2. Test. Ritz values and vectors are those of H itself in the span of the 12, the residuals
//    |H x - theta x| are measured, and the first one has to come down to rounding.
// 3. Proof. Start vectors can be unlucky, so what was found need not be the end. With the 12
//    vectors X found so far (orthonormal rows) and c = 2 |H|, factorise
//      B = tau I - s H + c X^T X = L L^T.
//    It exists if no eigenvector beyond tau has been missed. The block matrix (B, X^T; X, I / c)
//    has two Schur complements, tau I - s H and S = I / c - X B^-1 X^T, so by Sylvester's law
//      s H has as many eigenvalues above tau as S (12 x 12) has below zero,
//    and as many Ritz values above tau, by more than their residuals, are all of them (Kahan 1967:
//    orthonormal x_i, one eigenvalue within the residual of each). How many of them form the
//    extreme is then a matter of counting. The same factor serves the search (Woodbury):
//      (tau I - s H)^-1 = B^-1 + B^-1 X^T S^-1 X B^-1.
// Where X is still too rough for that, the factor is that of sigma I - s H with sigma beyond the
// end, whose existence says that it is.
//
// Clusters of more than a few, such as the null space of a singular matrix, leave no gap within
// reach: then, and wherever else a step fails, the answer is "refused", and a reduction decides.

constexpr int64_t kMostSteps = 7;
constexpr int64_t kMostAbove = 8;  // eigenvalues above tau: some of the 12 vectors are to spare

// Uniform in (-1, 1), from a counter: nothing of the caller's random state is touched.
inline double start_entry(uint64_t index) {
  uint64_t x = (index + 1) * 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-52 - 1.0;
}

// All eigenvalues of the symmetric a (m x m, m a multiple of 12; destroyed), unordered, and
// vectors as rows. Reduction, then implicit QL with shifts (Golub and Van Loan, 8.3).
inline bool small_eigen(double* a, int64_t m, double* values, double* vectors) {
  std::vector<double> memory(m * m + 6 * m);
  double *v = memory.data(), *d = values, *e = v + m * m, *tau = e + m, *work = tau + m;
  const Reduction reduction{m, m, a, d, e, v, tau, work};
  reduce_by_passes(reduction, [](int64_t count, int64_t, const auto& f) { f(0, count); });
  e[m - 1] = 0.0;
  std::fill(vectors, vectors + m * m, 0.0);
  for (int64_t i = 0; i < m; ++i)
    vectors[i * m + i] = 1.0;
  double largest = 0.0;
  for (int64_t i = 0; i < m; ++i)
    largest = std::max(largest, std::abs(d[i]) + std::abs(e[i]));
  constexpr int most = 60;
  for (int64_t low = 0; low < m; ++low) {
    for (int pass = 0;; ++pass) {
      int64_t high = low;
      while (high + 1 < m &&
             !(std::abs(e[high]) <= kEps * (std::abs(d[high]) + std::abs(d[high + 1])) ||
               std::abs(e[high]) <= 1e-30 * largest))
        ++high;
      if (high == low)
        break;
      if (pass == most)
        return false;
      double g = (d[low + 1] - d[low]) / (2.0 * e[low]);
      g = d[high] - d[low] + e[low] / (g + std::copysign(std::hypot(g, 1.0), g));
      double sine = 1.0, cosine = 1.0, shift = 0.0;
      int64_t i = high - 1;
      for (; i >= low; --i) {
        const double f = sine * e[i], b = cosine * e[i];
        const double r = std::hypot(f, g);
        e[i + 1] = r;
        if (r == 0.0) {
          d[i + 1] -= shift;
          e[high] = 0.0;
          break;
        }
        sine = f / r;
        cosine = g / r;
        g = d[i + 1] - shift;
        const double next = (d[i] - g) * sine + 2.0 * cosine * b;
        shift = sine * next;
        d[i + 1] = g + shift;
        g = cosine * next - b;
        double *lower = vectors + i * m, *upper = lower + m;
        for (int64_t j = 0; j < m; ++j) {
          const double x = upper[j], y = lower[j];
          upper[j] = sine * y + cosine * x;
          lower[j] = cosine * y - sine * x;
        }
      }
      if (i >= low)
        continue;
      d[low] -= shift;
      e[low] = g;
      e[high] = 0.0;
    }
  }
  for (int64_t i = 0; i < m; ++i)
    apply_q(reduction, /*transposed=*/false, vectors + i * m);
  return true;
}

// Twelve rows of length side as a panel, and back.
inline void to_panel(const double* rows, int64_t side, double* panel) {
  for (int64_t c = 0; c < kPanel; ++c)
    for (int64_t k = 0; k < side; ++k)
      panel[k * kPanel + c] = rows[c * side + k];
}

inline void from_panel(const double* panel, int64_t side, double* rows) {
  for (int64_t k = 0; k < side; ++k)
    for (int64_t c = 0; c < kPanel; ++c)
      rows[c * side + k] = panel[k * kPanel + c];
}

// The 12 rows x of length side become orthonormal, and orthogonal to the `count` orthonormal rows
// of basis (a multiple of 4). What x had in their span goes to `along` ([count, 12]) if not null. A
// vector that lies in the span is replaced by a start vector. panel: scratch, [side, 12].
inline void append(
    const double* basis,
    int64_t count,
    int64_t t,
    int64_t side,
    double* x,
    double* panel,
    double* along) {
  std::vector<double> memory(kPanel * count + 1);
  double* coefficients = memory.data();
  // Twice is enough (Parlett 1998, 6.9), unless a vector had to be replaced.
  constexpr int most_passes = 6;
  bool replaced = false;
  for (int pass = 0; pass < 2 || (replaced && pass < most_passes); ++pass) {
    replaced = false;
    if (count > 0) {
      to_panel(x, side, panel);
      std::fill(coefficients, coefficients + kPanel * count, 0.0);
      for (int64_t i = 0; i < count; i += 4)
        tile(basis + i * side, side, 1, panel, side, coefficients + i * kPanel, kPanel);
      if (pass == 0 && along != nullptr)
        std::copy(coefficients, coefficients + kPanel * count, along);
      for (int64_t i = 0; i < kPanel * count; ++i)
        coefficients[i] = -coefficients[i];
      for (int64_t k = 0; k < side; k += 4)
        tile(basis + k, 1, side, coefficients, count, panel + k * kPanel, kPanel);
    }
    double before[kPanel];
    for (int64_t c = 0; c < kPanel; ++c)
      before[c] = std::sqrt(dot(x + c * side, x + c * side, side));
    if (count > 0)
      from_panel(panel, side, x);
    for (int64_t c = 0; c < kPanel; ++c) {
      double* row = x + c * side;
      for (int64_t q = 0; q < c; ++q) {
        const double* other = x + q * side;
        const double factor = dot(row, other, side);
        for (int64_t i = 0; i < side; ++i)
          row[i] -= factor * other[i];
      }
      double length = std::sqrt(dot(row, row, side));
      if (!(length > 64.0 * kEps * before[c])) {
        replaced = true;
        std::fill(row, row + side, 0.0);
        for (int64_t i = 0; i < t; ++i)
          row[i] = start_entry(static_cast<uint64_t>((count + c + 1) * side + i));
        length = std::sqrt(dot(row, row, side));
      }
      const double inverse = 1.0 / length;
      for (int64_t i = 0; i < side; ++i)
        row[i] *= inverse;
    }
  }
}

// Ritz values of an operator and |A x - value x|, in the order of the rows they belong to.
struct Ritz {
  double value[kPanel] = {}, residual[kPanel] = {};
};

// The 12 rows become those Ritz vectors of the symmetric operator with the largest Ritz values, of
// the space that they and their images span; `least` those with the smallest, if not null. The
// rows need not be orthonormal. apply(in, out) acts on panels. by_magnitude: the largest |value|.
template <typename Apply>
bool krylov(
    const Apply& apply,
    int64_t t,
    int64_t side,
    int64_t steps,
    double* rows,
    double* least,
    Ritz& ritz,
    bool by_magnitude = false) {
  const int64_t m = steps * kPanel, block = kPanel * side;
  std::vector<double> memory(m * side + 2 * block + 2 * m * m + m + kPanel * m);
  double *basis = memory.data(), *in = basis + m * side, *out = in + block;
  double *small = out + block, *vectors = small + m * m, *values = vectors + m * m;
  double* along = values + m;
  std::copy(rows, rows + block, basis);
  append(basis, 0, t, side, basis, out, nullptr);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t known = (step + 1) * kPanel;
    to_panel(basis + step * block, side, in);
    apply(in, out);
    if (step + 1 < steps) {
      from_panel(out, side, basis + known * side);
      append(basis, known, t, side, basis + known * side, out, along);
    } else {
      std::fill(along, along + kPanel * known, 0.0);
      for (int64_t i = 0; i < known; i += 4)
        tile(basis + i * side, side, 1, out, side, along + i * kPanel, kPanel);
      // What the last images have outside the space, into the place of the last input.
      for (int64_t i = 0; i < kPanel * known; ++i)
        along[i] = -along[i];
      for (int64_t k = 0; k < side; k += 4)
        tile(basis + k, 1, side, along, known, out + k * kPanel, kPanel);
      for (int64_t i = 0; i < kPanel * known; ++i)
        along[i] = -along[i];
      from_panel(out, side, in);
    }
    for (int64_t i = 0; i < known; ++i)
      for (int64_t c = 0; c < kPanel; ++c)
        small[(step * kPanel + c) * m + i] = along[i * kPanel + c];
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      // A block on the diagonal was computed twice.
      const double both =
          i / kPanel == j / kPanel ? 0.5 * (small[i * m + j] + small[j * m + i]) : small[i * m + j];
      small[i * m + j] = small[j * m + i] = both;
    }
  }
  if (!small_eigen(small, m, values, vectors))
    return false;
  std::vector<int64_t> order(m);
  for (int64_t i = 0; i < m; ++i)
    order[i] = i;
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return by_magnitude ? std::abs(values[i]) > std::abs(values[j]) : values[i] > values[j];
  });
  const auto combine = [&](int64_t index, double* to) {
    const double* weights = vectors + index * m;
    std::fill(to, to + side, 0.0);
    combine_rows<double, 1>(basis, side, 0, m, &weights, &to);
  };
  for (int64_t c = 0; c < kPanel; ++c) {
    combine(order[c], rows + c * side);
    if (least != nullptr)
      combine(order[m - 1 - c], least + c * side);
    ritz.value[c] = values[order[c]];
    const double* weights = vectors + order[c] * m + m - kPanel;
    std::fill(out, out + side, 0.0);
    combine_rows<double, 1>(in, side, 0, kPanel, &weights, &out);
    ritz.residual[c] = std::sqrt(dot(out, out, side));
  }
  return true;
}

// One end of the spectrum of h: the top of sign h.
struct End {
  double sign = 1.0;
  double theta[kPanel] = {};     // Ritz values of sign h, descending
  double residual[kPanel] = {};  // |h x - sign theta x|
  double guess[kPanel] = {};     // eigenvalues of sign h by what knows them best
  double reach[kPanel] = {};     // how far off these may be
  std::vector<double> rows;      // [12, side], orthonormal
  double tau = 0.0;              // a point below the end, and
  int64_t above = 0;             // the number of eigenvalues above it: the first theta, proven
};

// Ritz values, vectors and residuals of h in the span of the rows.
template <typename Run>
bool rayleigh_ritz(const double* h, int64_t side, const Run& run, End& end) {
  const int64_t block = kPanel * side;
  constexpr int64_t m = kPanel;
  std::vector<double> memory(3 * block);
  double *in = memory.data(), *out = in + block, *images = out + block;
  to_panel(end.rows.data(), side, in);
  multiply_panel(h, side, in, out, run);
  from_panel(out, side, images);
  double small[m * m], vectors[m * m], values[m];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j <= i; ++j)
      small[i * m + j] = small[j * m + i] =
          end.sign * 0.5 *
          (dot(end.rows.data() + i * side, images + j * side, side) +
           dot(end.rows.data() + j * side, images + i * side, side));
  if (!small_eigen(small, m, values, vectors))
    return false;
  int64_t order[m];
  for (int64_t i = 0; i < m; ++i)
    order[i] = i;
  std::sort(order, order + m, [&](int64_t i, int64_t j) { return values[i] > values[j]; });
  std::fill(memory.begin(), memory.begin() + 2 * block, 0.0);
  for (int64_t c = 0; c < m; ++c) {
    const double* weights = vectors + order[c] * m;
    double *x = in + c * side, *y = out + c * side;
    combine_rows<double, 1>(end.rows.data(), side, 0, m, &weights, &x);
    combine_rows<double, 1>(images, side, 0, m, &weights, &y);
    const double square = dot(x, x, side), quotient = dot(x, y, side) / square;
    double residual = 0.0;
    for (int64_t i = 0; i < side; ++i) {
      const double r = y[i] - quotient * x[i];
      residual += r * r;
    }
    end.theta[c] = end.sign * quotient;
    end.residual[c] = std::sqrt(residual / square);
  }
  std::copy(in, in + block, end.rows.begin());
  return true;
}

// m <- lower triangle of shift I - sign h + weight sum of x_i x_i^T over `count` rows, with ones
// on the diagonal of the padding.
template <typename Run>
void shifted(
    const double* h,
    int64_t t,
    int64_t side,
    double sign,
    double shift,
    double weight,
    const double* rows,
    int64_t count,
    const Run& run,
    double* m) {
  run(side, std::max<int64_t>(1, 100000 / side), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* to = m + i * side;
      const double* from = h + i * side;
      for (int64_t j = 0; j <= i; ++j)
        to[j] = -sign * from[j];
      for (int64_t c = 0; c < count; ++c) {
        const double* x = rows + c * side;
        const double factor = weight * x[i];
        for (int64_t j = 0; j <= i; ++j)
          to[j] += factor * x[j];
      }
      to[i] += i < t ? shift : 1.0;
    }
  });
}

// B = tau I - sign h + c X^T X and what its Woodbury formula needs.
struct Deflated {
  double tau = 0.0;
  int64_t above = 0;                // eigenvalues of sign h above tau
  std::vector<double> x, y;         // [12, side]: X, and the panel B^-1 X^T
  double inverse[kPanel * kPanel];  // S^-1
};

// m <- the factor of B. False: B is not positive definite, or an eigenvalue lies at tau.
template <typename Run>
bool deflate(
    const double* h,
    int64_t t,
    int64_t side,
    double size,
    double tau,
    const End& end,
    const Run& run,
    double* m,
    Deflated& d) {
  shifted(h, t, side, end.sign, tau, 2.0 * size, end.rows.data(), kPanel, run, m);
  if (!cholesky(m, side, run))
    return false;
  d.tau = tau;
  d.x = end.rows;
  d.y.assign(kPanel * side, 0.0);
  to_panel(d.x.data(), side, d.y.data());
  solve_panel(m, side, d.y.data(), run);
  constexpr int64_t n = kPanel;
  double s[n * n] = {}, vectors[n * n], values[n];
  for (int64_t i = 0; i < n; i += kRows)
    tile(d.x.data() + i * side, side, 1, d.y.data(), side, s + i * n, n);
  double full[n * n];
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      full[i * n + j] = (i == j ? 0.5 / size : 0.0) - 0.5 * (s[i * n + j] + s[j * n + i]);
  if (!small_eigen(full, n, values, vectors))
    return false;
  double largest = 0.0;
  for (const double value : values)
    largest = std::max(largest, std::abs(value));
  d.above = 0;
  std::fill(d.inverse, d.inverse + n * n, 0.0);
  for (int64_t q = 0; q < n; ++q) {
    // A sign that rounding could have made.
    if (!(std::abs(values[q]) > 1e-9 * largest))
      return false;
    d.above += values[q] < 0.0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        d.inverse[i * n + j] += vectors[q * n + i] * vectors[q * n + j] / values[q];
  }
  return true;
}

// out = (sign h - tau)^-1 in, for panels.
template <typename Run>
void apply_deflated(
    const double* m,
    const Deflated& d,
    int64_t side,
    const double* in,
    double* out,
    const Run& run) {
  constexpr int64_t n = kPanel;
  std::copy(in, in + n * side, out);
  solve_panel(m, side, out, run);
  double along[n * n] = {}, weights[n * n] = {};
  for (int64_t i = 0; i < n; i += kRows)
    tile(d.x.data() + i * side, side, 1, out, side, along + i * n, n);
  for (int64_t i = 0; i < n; i += kRows)
    tile(d.inverse + i * n, n, 1, along, n, weights + i * n, n);
  for (int64_t k = 0; k < side; k += kRows)
    tile(d.y.data() + k * n, n, 1, weights, n, out + k * n, n);
  for (int64_t i = 0; i < n * side; ++i)
    out[i] = -out[i];
}

// x_i <- x_i - (sign h - tau)^-1 (sign h - theta_i) x_i for the Ritz vectors above tau.
template <typename Run>
void correct_rows(
    const double* h,
    int64_t t,
    int64_t side,
    const double* m,
    const Deflated& d,
    const Run& run,
    End& end) {
  const int64_t block = kPanel * side;
  std::vector<double> memory(2 * block);
  double *in = memory.data(), *out = in + block;
  to_panel(end.rows.data(), side, in);
  multiply_panel(h, side, in, out, run);
  for (int64_t k = 0; k < side; ++k)
    for (int64_t c = 0; c < kPanel; ++c)
      out[k * kPanel + c] =
          c < d.above ? end.sign * out[k * kPanel + c] - end.theta[c] * in[k * kPanel + c] : 0.0;
  apply_deflated(m, d, side, out, in, run);
  from_panel(in, side, out);
  for (int64_t i = 0; i < block; ++i)
    end.rows[i] -= out[i];
  append(nullptr, 0, t, side, end.rows.data(), in, nullptr);
}

// True once the Ritz values above tau are all there are, the first one to rounding and those that
// may belong to it, to noise.
inline bool is_proven(const End& end, const Deflated& d, double near, double noise) {
  const int64_t k = d.above;
  if (k < 1 || k > kMostAbove || !(end.theta[0] - d.tau > near + 2.0 * noise))
    return false;
  double square = 0.0;
  for (int64_t i = 0; i < k; ++i) {
    square += end.residual[i] * end.residual[i];
    if (end.theta[0] - end.theta[i] <= 4.0 * near && !(end.residual[i] <= noise))
      return false;
  }
  return end.theta[k - 1] - std::sqrt(square) > d.tau + noise;
}

// Improves the rows until the end is proven and its residual is rounding. m: scratch,
// [side, side], and in the end the factor that d speaks of. size: about |h|; near: what lies that
// close to the extreme may belong to it.
template <typename Run>
bool converge(
    const double* h,
    int64_t t,
    int64_t side,
    double size,
    double near,
    const Run& run,
    double* m,
    Deflated& d,
    End& end) {
  constexpr int most_rounds = 10, most_factors = 7, most_plain = 3, most_stuck = 3;
  const double noise = noise_bound(t, size);
  const double target = 2.0 * std::sqrt(static_cast<double>(t)) * kEps * size;
  double before = std::numeric_limits<double>::infinity(), sigma = 0.0;
  enum class Factor : char { none, beyond, deflated } factor = Factor::none;
  int factors = 0;
  Ritz ritz;
  const auto trust_h = [&] {
    std::copy(end.theta, end.theta + kPanel, end.guess);
    std::copy(end.residual, end.residual + kPanel, end.reach);
  };
  trust_h();
  // Products cost less than factors, as long as they get anywhere; next to zero they do not.
  for (int plain = 0; plain < most_plain; ++plain) {
    const double spread = end.theta[0] - end.theta[kPanel - 1], last = end.residual[0];
    if (last <= 0.1 * spread || std::abs(end.theta[0]) < 0.05 * size)
      break;
    const auto forward = [&](const double* in, double* out) {
      multiply_panel(h, side, in, out, run);
      for (int64_t i = 0; i < kPanel * side; ++i)
        out[i] *= end.sign;
    };
    if (!krylov(forward, t, side, kMostSteps, end.rows.data(), nullptr, ritz) ||
        !rayleigh_ritz(h, side, run, end))
      return false;
    trust_h();
    if (!(end.residual[0] <= 0.3 * last))
      break;
  }
  const auto inverse = [&](const double* in, double* out) {
    if (factor == Factor::deflated)
      return apply_deflated(m, d, side, in, out, run);
    std::copy(in, in + kPanel * side, out);
    solve_panel(m, side, out, run);
  };
  double least = before;
  int stuck = 0;
  const auto polished = [&] {
    const double residual = end.residual[0];
    const bool accurate = residual <= target || (residual <= noise && residual > 0.25 * before);
    before = residual;
    if (!accurate || !is_proven(end, d, near, noise))
      return false;
    end.tau = d.tau;
    end.above = d.above;
    return true;
  };
  int64_t steps = kMostSteps;
  for (int round = 0; round < most_rounds; ++round) {
    const double top = end.guess[0], spread = top - end.guess[kPanel - 1];
    // A cluster wider than the block has no end within it.
    if (factor == Factor::beyond && spread <= 4.0 * near && end.reach[kPanel - 1] <= near)
      return false;
    // tau has to clear the cluster, and to leave few eigenvalues above it.
    const double rough = factor == Factor::none ? 0.25 : 0.5;
    if (factor != Factor::deflated && end.reach[0] <= rough * spread) {
      if (factors++ == most_factors)
        return false;
      const double error = end.reach[0] * end.reach[0] / spread;  // of the guess, about
      const double tau =
          top - std::max({2.0 * near + 4.0 * noise, error, 0.5 * (top - end.guess[1])});
      factor = deflate(h, t, side, size, tau, end, run, m, d) && d.above <= kMostAbove
                   ? Factor::deflated
                   : Factor::none;
    }
    double margin = std::max({2.0 * end.reach[0], 0.02 * spread, 4.0 * noise});
    if (factor == Factor::none ||
        (factor == Factor::beyond && sigma - top > 0.3 * spread && margin < 0.1 * (sigma - top))) {
      factor = Factor::none;
      // Where definiteness is plausible it is the better guess: zero may be much nearer.
      bool at_zero = top < 0.0 && top + margin > 0.0;
      while (factor == Factor::none) {
        if (factors++ == most_factors)
          return false;
        sigma = at_zero ? 0.0 : top + margin;
        shifted(h, t, side, end.sign, sigma, 0.0, nullptr, 0, run, m);
        if (cholesky(m, side, run))
          factor = Factor::beyond;
        if (!at_zero)
          margin *= 8.0;
        at_zero = false;
      }
    }
    const bool deflated = factor == Factor::deflated;
    if (!krylov(inverse, t, side, steps, end.rows.data(), nullptr, ritz, deflated))
      return false;
    if (!deflated) {
      for (int64_t c = 0; c < kPanel; ++c) {
        const double value = ritz.value[c];
        if (!(value > 0.0))
          return false;
        end.guess[c] = sigma - 1.0 / value;
        end.reach[c] = ritz.residual[c] / (value * value);
      }
      continue;
    }
    if (!rayleigh_ritz(h, side, run, end))
      return false;
    if (polished())
      return true;
    // Rounding in the inverse, not in the space: one step of Newton's method with the residual of
    // h itself takes it away.
    if (end.residual[0] <= 1e-9 * size) {
      correct_rows(h, t, side, m, d, run, end);
      if (!rayleigh_ritz(h, side, run, end))
        return false;
      if (polished())
        return true;
    }
    // A gap that rounding closes leaves a residual that nothing brings down.
    stuck = end.residual[0] > 0.5 * least ? stuck + 1 : 0;
    least = std::min(least, end.residual[0]);
    if (stuck == most_stuck)
      return false;
    steps = end.residual[0] > 1e-6 * size ? kMostSteps : 4;
  }
  return false;
}

// Both ends of h from one space. scale of |h|_2 from below.
template <typename Run>
bool start_ends(const double* h, int64_t t, int64_t side, const Run& run, End ends[2]) {
  for (int c = 0; c < 2; ++c) {
    ends[c].sign = c == 0 ? 1.0 : -1.0;
    ends[c].rows.assign(kPanel * side, 0.0);
  }
  for (int64_t c = 0; c < kPanel; ++c)
    for (int64_t i = 0; i < t; ++i)
      ends[0].rows[c * side + i] = start_entry(static_cast<uint64_t>(c * t + i));
  const auto forward = [&](const double* in, double* out) {
    multiply_panel(h, side, in, out, run);
  };
  Ritz ritz;
  return krylov(forward, t, side, kMostSteps, ends[0].rows.data(), ends[1].rows.data(), ritz) &&
         rayleigh_ritz(h, side, run, ends[0]) && rayleigh_ritz(h, side, run, ends[1]);
}

// Algebraic extremes of h (t x t, leading dimension padded(t), zero beyond t), or refused.
template <typename Run>
bool large_symmetric_extremes(
    const double* h, int64_t t, double cluster_rtol, const Run& run, SymmetricPair& out) {
  const int64_t side = padded(t);
  End ends[2];
  if (!start_ends(h, t, side, run, ends))
    return false;
  std::vector<double> m(side * side);
  Deflated d;
  double size = std::max(std::abs(ends[0].theta[0]), std::abs(ends[1].theta[0]));
  // The larger end first: its value is the size that the tolerances of both are relative to.
  const int first = std::abs(ends[0].theta[0]) >= std::abs(ends[1].theta[0]) ? 0 : 1;
  for (const int c : {first, 1 - first}) {
    // 1.5: what the first estimate of the size may lack.
    const double near = 1.5 * cluster_rtol * size + noise_bound(t, size);
    if (!converge(h, t, side, size, near, run, m.data(), d, ends[c]))
      return false;
    size = std::max(size, std::abs(ends[c].theta[0]));
  }
  const double near = cluster_rtol * size;
  for (int c = 0; c < 2; ++c) {
    const End& end = ends[c];
    if (!(end.theta[0] - end.tau > near + 2.0 * noise_bound(t, size)))
      return false;
    int64_t multiplicity = 1;
    while (multiplicity < end.above && end.theta[0] - end.theta[multiplicity] <= near)
      ++multiplicity;
    (c == 0 ? out.multiplicity_max : out.multiplicity_min) = multiplicity;
    (c == 0 ? out.lambda_max : out.lambda_min) = end.sign * end.theta[0];
    std::copy(end.rows.data(), end.rows.data() + t, c == 0 ? out.v_max : out.v_min);
  }
  out.lambda_min = std::min(out.lambda_min, out.lambda_max);
  return true;
}
