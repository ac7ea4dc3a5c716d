// Selected eigenvalues and eigenvectors of a symmetric tridiagonal matrix T. Torch-free.
//
// Counting: the pivots q_i = d_i - x - e_{i-1}^2 / q_{i-1} of T - x I have as many negative signs
// as T has eigenvalues below x (Sylvester), and in floating point that number is exact for a matrix
// within a few eps |T| of T. Each pass counts at 16 points, since a division takes as long as it
// takes and four vectors of them hide that; it shrinks an interval 17 times.
//
// Vectors: for an eigenvalue x take the pivots from the top, q+, and from the bottom, q-. With
//   gamma_r = q+_r + q-_r - (d_r - x),
// the vector z with z_r = 1, z_{i-1} = -e_{i-1} z_i / q+_{i-1} (i <= r),
// z_{i+1} = -e_i z_i / q-_{i+1} (i >= r) satisfies (T - x) z = gamma_r e_r exactly. The r with the
// smallest |gamma_r| gives a residual |gamma_r| / |z| within a factor sqrt(t) of the best possible
// (Fernando 1997; Dhillon and Parlett 2004).
//
// Corrections: (T - x) delta = b is all but singular. Fixing delta_r = 0 drops row and column r,
// and what remains, T without r, is well away from singular, exactly because z_r is not small. For
// an extreme eigenvalue it is definite as well (interlacing), so elimination needs no pivoting. The
// pivots are those of the vector.

struct Tridiagonal {
  int64_t t;
  const double* d;         // [t]
  const double* e;         // [t - 1]
  const double* e_square;  // [t - 1]
  double norm;             // an upper bound of |T|_2
  double pivot_min;        // pivots below this magnitude are replaced by minus it
};

inline double norm_bound(int64_t t, const double* d, const double* e) {
  double bound = 0.0;
  for (int64_t i = 0; i < t; ++i) {
    const double left = i > 0 ? std::abs(e[i - 1]) : 0.0;
    const double right = i + 1 < t ? std::abs(e[i]) : 0.0;
    bound = std::max(bound, std::abs(d[i]) + left + right);
  }
  return bound;
}

constexpr int64_t kPoints = 16;

// counts[s] = number of eigenvalues below x[s].
inline void count(const Tridiagonal& m, const double* x, int64_t* counts) {
  constexpr int kVectors = kPoints / 4;
  Vec4 shift[kVectors], q[kVectors];
  Count4 below[kVectors] = {};
  const Vec4 floor = {m.pivot_min, m.pivot_min, m.pivot_min, m.pivot_min};
  for (int k = 0; k < kVectors; ++k) {
    load(shift[k], x + 4 * k);
    q[k] = Vec4{1.0, 1.0, 1.0, 1.0};
  }
  for (int64_t i = 0; i < m.t; ++i) {
    const double coupling = i > 0 ? m.e_square[i - 1] : 0.0;
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      Vec4 next = m.d[i] - shift[k] - coupling / q[k];
      // Small pivots count as negative.
      next = next < floor ? (next > -floor ? -floor : next) : next;
      below[k] -= next < Vec4{};
      q[k] = next;
    }
  }
  for (int k = 0; k < kVectors; ++k)
    for (int s = 0; s < 4; ++s)
      counts[4 * k + s] = below[k][s];
}

// Eigenvalue number `index` (ascending, from 0) to about eps * norm.
inline double eigenvalue(const Tridiagonal& m, int64_t index) {
  const double eps = std::numeric_limits<double>::epsilon();
  double low = -m.norm * (1.0 + 8.0 * eps), high = m.norm * (1.0 + 8.0 * eps);
  // 17^14 > 2^56: the interval has shrunk to its last bits before the count of passes runs out.
  for (int pass = 0; pass < 16 && high - low > 0.5 * eps * m.norm; ++pass) {
    double x[kPoints];
    int64_t below[kPoints];
    const double step = (high - low) / static_cast<double>(kPoints + 1);
    for (int64_t s = 0; s < kPoints; ++s)
      x[s] = low + step * static_cast<double>(s + 1);
    count(m, x, below);
    double new_low = low, new_high = high;
    for (int64_t s = 0; s < kPoints; ++s)
      if (below[s] <= index)
        new_low = x[s];
    for (int64_t s = kPoints - 1; s >= 0; --s)
      if (below[s] > index && x[s] > new_low)
        new_high = x[s];
    if (new_low == low && new_high == high)
      break;
    low = new_low;
    high = new_high;
  }
  return 0.5 * (low + high);
}

// Pivots of T - x I from both ends, and where they meet.
struct Twist {
  double *top, *bottom;  // [t] each
  double x;
  int64_t r;
};

inline double safe_pivot(double q, double pivot_min) {
  return std::abs(q) < pivot_min ? -pivot_min : q;
}

inline Twist twist(const Tridiagonal& m, double x, double* top, double* bottom) {
  for (int64_t i = 0; i < m.t; ++i) {
    const double q = m.d[i] - x - (i > 0 ? m.e_square[i - 1] / top[i - 1] : 0.0);
    top[i] = safe_pivot(q, m.pivot_min);
  }
  for (int64_t i = m.t - 1; i >= 0; --i) {
    const double q = m.d[i] - x - (i + 1 < m.t ? m.e_square[i] / bottom[i + 1] : 0.0);
    bottom[i] = safe_pivot(q, m.pivot_min);
  }
  Twist found{top, bottom, x, 0};
  double best = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < m.t; ++i) {
    const double gamma = std::abs(top[i] + bottom[i] - (m.d[i] - x));
    if (gamma < best) {
      best = gamma;
      found.r = i;
    }
  }
  return found;
}

// Scales z to unit length and returns what it divided by.
inline double normalise(double* z, int64_t t) {
  double largest = 0.0;
  for (int64_t i = 0; i < t; ++i)
    largest = std::max(largest, std::abs(z[i]));
  const double inverse = 1.0 / largest;
  double square = 0.0;
  for (int64_t i = 0; i < t; ++i) {
    z[i] *= inverse;
    square += z[i] * z[i];
  }
  const double length = std::sqrt(square);
  for (int64_t i = 0; i < t; ++i)
    z[i] /= length;
  return largest * length;
}

// The eigenvector that belongs to the twist, of unit length. Returns |(T - x) z|.
inline double eigenvector(const Tridiagonal& m, const Twist& w, double* z) {
  z[w.r] = 1.0;
  for (int64_t i = w.r; i > 0; --i)
    z[i - 1] = -m.e[i - 1] * z[i] / w.top[i - 1];
  for (int64_t i = w.r; i + 1 < m.t; ++i)
    z[i + 1] = -m.e[i] * z[i] / w.bottom[i + 1];
  const double gamma = w.top[w.r] + w.bottom[w.r] - (m.d[w.r] - w.x);
  return std::abs(gamma) / normalise(z, m.t);
}

// b <- delta with (T - x) delta = b but for row r, delta orthogonal to z.
inline void correct(const Tridiagonal& m, const Twist& w, const double* z, double* b) {
  for (int64_t i = 1; i < w.r; ++i)
    b[i] -= m.e[i - 1] * b[i - 1] / w.top[i - 1];
  for (int64_t i = w.r - 1; i >= 0; --i)
    b[i] = (b[i] - (i + 1 < w.r ? m.e[i] * b[i + 1] : 0.0)) / w.top[i];
  for (int64_t i = m.t - 2; i > w.r; --i)
    b[i] -= m.e[i] * b[i + 1] / w.bottom[i + 1];
  for (int64_t i = w.r + 1; i < m.t; ++i)
    b[i] = (b[i] - (i - 1 > w.r ? m.e[i - 1] * b[i - 1] : 0.0)) / w.bottom[i];
  b[w.r] = 0.0;
  double along = 0.0;
  for (int64_t i = 0; i < m.t; ++i)
    along += z[i] * b[i];
  for (int64_t i = 0; i < m.t; ++i)
    b[i] -= along * z[i];
}

// b <- (T + shift)^-1 b for T + shift positive definite; pivots: [t] of scratch.
inline void solve_shifted(const Tridiagonal& m, double shift, double* pivots, double* b) {
  for (int64_t i = 0; i < m.t; ++i) {
    const double q = m.d[i] + shift - (i > 0 ? m.e_square[i - 1] / pivots[i - 1] : 0.0);
    pivots[i] = safe_pivot(q, m.pivot_min);
    if (i > 0)
      b[i] -= m.e[i - 1] * b[i - 1] / pivots[i - 1];
  }
  for (int64_t i = m.t - 1; i >= 0; --i)
    b[i] = (b[i] - (i + 1 < m.t ? m.e[i] * b[i + 1] : 0.0)) / pivots[i];
}
