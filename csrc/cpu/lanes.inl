// The body of lanes.h, by every_set.inl, with IMMUNIZE_EXT_LANES doubles a vector.
//
// Lower case letters are vectors with one matrix a lane; k >= t are the sides of each.
//
// Singular values. The matrix, tall, becomes U B V^T with B upper bidiagonal (diagonal d,
// superdiagonal e), by Householder reflections from both sides: a backward error of a few eps
// sigma_max. With q = d^2 and f = e^2 the stationary transformation
//   D_i = q_i + s_i,  s_0 = -x,  s_{i+1} = f_i s_i / D_i - x
// gives the pivots of B^T B - x I without a cancellation in them, so the squares of all singular
// values of B are determined by it to a few eps of themselves (Fernando and Parlett 1994).
//
// Symmetric matrices become tridiagonal, and T minus a lower bound of its spectrum is L D L^T, in
// the same q and f: from there on both are one problem.
//
// Extremes. All roots of p(x) = det(B^T B - x) are real, so Laguerre's iteration
//   x <- x - n / (G +- sqrt((n - 1) (n H - G^2))),  G = p'/p = sum 1 / (x - lambda_i),
//                                                    H = -G' = sum 1 / (x - lambda_i)^2
// approaches the largest root from any point above it, and the smallest from any point below,
// without ever passing it, and cubically where it is simple. G and H come with the pivots: with
// g = s'/D, h = s''/D,
//   s'_{i+1} = f_i q_i g / D_i - 1,  s''_{i+1} = f_i q_i (h - 2 g^2) / D_i,
//   G = sum g,  H = sum g^2 - h.
// A lane that has arrived waits unchanged for the others.
//
// Vectors. With the pivots from the other end (p_{t-1} = q_{t-1} - x, R_{i+1} = f_i + p_{i+1},
// p_i = p_{i+1} q_i / R_{i+1} - x) and gamma_i = s_i + p_i + x, the vector
//   z_r = 1,  z_i = -(d_i e_i / D_i) z_{i+1} (i < r),  z_{i+1} = -(d_i e_i / R_{i+1}) z_i (i >= r)
// satisfies (B^T B - x) z = gamma_r e_r; r minimises |gamma_r| (Dhillon and Parlett 2004). The
// other vector follows from the bidiagonal relations in the direction that damps errors: B v =
// sigma u for the largest value, B^T u = sigma v for the smallest.
//
// Values are Rayleigh quotients of the matrix itself, and both residuals of each triplet are tested
// against 4 sqrt(n + p) eps sigma_max, the test of gram_route.inl: proven, or left to other routes.

#define IMMUNIZE_EXT_LANES_INLINE inline __attribute__((always_inline))

constexpr int64_t kWidth = IMMUNIZE_EXT_LANES;
typedef double Vec __attribute__((vector_size(8 * IMMUNIZE_EXT_LANES)));
typedef int64_t Mask __attribute__((vector_size(8 * IMMUNIZE_EXT_LANES)));

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kIterations = 80;
// Entries are scaled to at most 2; a pivot of that size moves no eigenvalue that counts.
constexpr double kSmallestPivot = 1e-140;

IMMUNIZE_EXT_LANES_INLINE Vec all(double x) {
  return Vec{} + x;
}

IMMUNIZE_EXT_LANES_INLINE Vec select(const Mask& mask, const Vec& yes, const Vec& no) {
  return mask ? yes : no;
}

IMMUNIZE_EXT_LANES_INLINE Vec larger(const Vec& a, const Vec& b) {
  return a > b ? a : b;
}

IMMUNIZE_EXT_LANES_INLINE Vec magnitude(const Vec& x) {
  return reinterpret_cast<Vec>(reinterpret_cast<Mask>(x) & INT64_MAX);
}

IMMUNIZE_EXT_LANES_INLINE bool any(const Mask& mask) {
  int64_t bits = 0;
  for (int64_t l = 0; l < kWidth; ++l)
    bits |= mask[l];
  return bits != 0;
}

IMMUNIZE_EXT_LANES_INLINE Vec root(const Vec& x) {
#if IMMUNIZE_EXT_LANES == 8
  return reinterpret_cast<Vec>(_mm512_maskz_sqrt_pd(0xff, reinterpret_cast<__m512d>(x)));
#elif IMMUNIZE_EXT_LANES == 4
  return reinterpret_cast<Vec>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vec>(_mm_sqrt_pd(reinterpret_cast<__m128d>(x)));
#else
  Vec y;
  for (int64_t l = 0; l < kWidth; ++l)
    y[l] = std::sqrt(x[l]);
  return y;
#endif
}

// --- reflections ----------------------------------------------------------------------------------

// x (m entries, `along` apart) <- v with v_0 = 1, and I - tau v v^T maps x to (beta, 0, .., 0).
IMMUNIZE_EXT_LANES_INLINE void reflector(Vec* x, int64_t m, int64_t along, Vec& beta, Vec& tau) {
  const Vec alpha = x[0];
  Vec first = {}, second = {};
  int64_t i = 1;
  for (; i + 2 <= m; i += 2) {
    first += x[i * along] * x[i * along];
    second += x[(i + 1) * along] * x[(i + 1) * along];
  }
  if (i < m)
    first += x[i * along] * x[i * along];
  const Vec square = first + second;
  const Mask none = square == 0.0;
  const Vec length = root(alpha * alpha + square);
  const Vec moved = alpha < 0.0 ? length : -length;
  beta = select(none, alpha, moved);
  const Vec inverse = select(none, Vec{}, 1.0 / (alpha - moved));
  tau = select(none, Vec{}, (moved - alpha) / moved);
  x[0] = all(1.0);
  for (i = 1; i < m; ++i)
    x[i * along] *= inverse;
}

// x <- (I - tau v v^T) x for C vectors x, their entries `along` and themselves `across` apart.
template <int C>
IMMUNIZE_EXT_LANES_INLINE void reflect_some(
    const Vec* v, int64_t step, const Vec& tau, int64_t m, Vec* x, int64_t along, int64_t across) {
  Vec w[C] = {};
  for (int64_t i = 0; i < m; ++i) {
    const Vec vi = v[i * step];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      w[c] += vi * x[i * along + c * across];
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
    w[c] *= tau;
  for (int64_t i = 0; i < m; ++i) {
    const Vec vi = v[i * step];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      x[i * along + c * across] -= vi * w[c];
  }
}

inline void reflect(
    const Vec* v,
    int64_t step,
    const Vec& tau,
    int64_t m,
    Vec* x,
    int64_t along,
    int64_t across,
    int64_t count) {
  int64_t c = 0;
  for (; c + 8 <= count; c += 8)
    reflect_some<8>(v, step, tau, m, x + c * across, along, across);
  if (c + 4 <= count) {
    reflect_some<4>(v, step, tau, m, x + c * across, along, across);
    c += 4;
  }
  if (c + 2 <= count) {
    reflect_some<2>(v, step, tau, m, x + c * across, along, across);
    c += 2;
  }
  if (c < count)
    reflect_some<1>(v, step, tau, m, x + c * across, along, across);
}

// --- the spectrum of q and f ----------------------------------------------------------------------

struct Factored {
  int64_t t;
  const Vec *q, *f;     // [t], [t - 1]
  const Vec* coupling;  // [t - 1]: off-diagonal entries
};

IMMUNIZE_EXT_LANES_INLINE Vec safe_pivot(const Vec& x) {
  return magnitude(x) < kSmallestPivot ? all(-kSmallestPivot) : x;
}

// Laguerre's steps from x [2]: down to the largest root, up to the smallest. Lanes that do not
// arrive are false in `arrived`.
inline void find_extremes(const Factored& m, Vec* x, const Mask& idle, Mask& arrived) {
  const double n = static_cast<double>(m.t);
  Mask moving[2] = {~idle, ~idle};
  for (int pass = 0; pass < kIterations && (any(moving[0]) || any(moving[1])); ++pass) {
    Vec s[2], first[2], second[2] = {}, sum[2] = {}, squares[2] = {};
    Mask passed[2] = {};  // by rounding: then x is the root to rounding
    for (int c = 0; c < 2; ++c) {
      s[c] = -x[c];
      first[c] = all(-1.0);
    }
    for (int64_t i = 0; i < m.t; ++i) {
      const Vec q = m.q[i], f = i + 1 < m.t ? m.f[i] : Vec{};
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const Vec pivot = safe_pivot(q + s[c]);
        const Vec inverse = 1.0 / pivot;
        passed[c] |= c == 0 ? pivot > 0.0 : pivot < 0.0;
        const Vec g = first[c] * inverse, h = second[c] * inverse;
        sum[c] += g;
        squares[c] += g * g - h;
        const Vec both = f * q * inverse;
        s[c] = f * s[c] * inverse - x[c];
        first[c] = both * g - 1.0;
        second[c] = both * (h - 2.0 * g * g);
      }
    }
    for (int c = 0; c < 2; ++c) {
      const Vec size = c == 0 ? sum[c] : -sum[c];
      // Where all roots are near each other the difference is its own rounding: a little more than
      // that, and no step is too long.
      const Vec difference = larger(n * squares[c] - size * size, Vec{});
      const Vec under = (n - 1.0) * (difference + 16.0 * n * n * kEps * squares[c]);
      const Vec step = n / (size + root(under));
      // Not a number: no step that says anything.
      moving[c] &= (step > 2.0 * kEps * x[c]) & ~passed[c];
      const Vec next = c == 0 ? x[c] - step : x[c] + step;
      x[c] = select(moving[c], next, x[c]);
    }
  }
  arrived = ~(moving[0] | moving[1]);
}

constexpr int kPoints = 3;

// below[j] = how many eigenvalues are below x[j]; as doubles.
inline void count(const Factored& m, const Vec* x, Vec* below) {
  Vec s[kPoints];
  for (int j = 0; j < kPoints; ++j) {
    s[j] = -x[j];
    below[j] = Vec{};
  }
  for (int64_t i = 0; i < m.t; ++i) {
    const Vec q = m.q[i], f = i + 1 < m.t ? m.f[i] : Vec{};
#pragma GCC unroll 3
    for (int j = 0; j < kPoints; ++j) {
      const Vec pivot = safe_pivot(q + s[j]);
      below[j] += pivot < 0.0 ? all(1.0) : Vec{};
      s[j] = f * s[j] / pivot - x[j];
    }
  }
}

// z[c * t ..] of unit length for the eigenvalues x [2]. scratch: 6 t.
inline void find_vectors(const Factored& m, const Vec* x, Vec* z, Vec* scratch) {
  const int64_t t = m.t;
  Vec *down = scratch, *up = down + 2 * t, *stationary = up + 2 * t;
  Vec s[2] = {-x[0], -x[1]}, p[2];
  for (int64_t i = 0; i < t; ++i) {
    const Vec q = m.q[i], f = i + 1 < t ? m.f[i] : Vec{};
    const Vec coupling = i + 1 < t ? m.coupling[i] : Vec{};
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      stationary[2 * i + c] = s[c];
      const Vec inverse = 1.0 / safe_pivot(q + s[c]);
      down[2 * i + c] = coupling * inverse;
      s[c] = f * s[c] * inverse - x[c];
    }
  }
  Vec best[2], place[2];
  for (int c = 0; c < 2; ++c) {
    p[c] = m.q[t - 1] - x[c];
    best[c] = magnitude(stationary[2 * (t - 1) + c] + p[c] + x[c]);
    place[c] = all(static_cast<double>(t - 1));
  }
  for (int64_t i = t - 2; i >= 0; --i) {
    const Vec q = m.q[i], f = m.f[i], coupling = m.coupling[i];
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const Vec inverse = 1.0 / safe_pivot(f + p[c]);
      up[2 * i + c] = coupling * inverse;
      p[c] = p[c] * q * inverse - x[c];
      const Vec gamma = magnitude(stationary[2 * i + c] + p[c] + x[c]);
      const Mask better = gamma < best[c];
      best[c] = select(better, gamma, best[c]);
      place[c] = select(better, all(static_cast<double>(i)), place[c]);
    }
  }
  for (int c = 0; c < 2; ++c) {
    Vec* to = z + c * t;
    Vec entry = {};
    for (int64_t i = t - 1; i >= 0; --i) {
      const Vec number = all(static_cast<double>(i));
      entry = number < place[c] ? -down[2 * i + c] * entry : Vec{};
      entry = number == place[c] ? all(1.0) : entry;
      to[i] = entry;
    }
    Vec square = {};
    entry = Vec{};
    for (int64_t i = 0; i < t; ++i) {
      const Vec number = all(static_cast<double>(i));
      const Vec follows = i > 0 ? -up[2 * (i - 1) + c] * entry : Vec{};
      entry = number > place[c] ? follows : to[i];
      to[i] = entry;
      square += entry * entry;
    }
    const Vec inverse = 1.0 / root(square);
    for (int64_t i = 0; i < t; ++i)
      to[i] *= inverse;
  }
}

IMMUNIZE_EXT_LANES_INLINE Vec square_of(const Vec* x, int64_t t) {
  Vec square = {};
  for (int64_t i = 0; i < t; ++i)
    square += x[i] * x[i];
  return square;
}

IMMUNIZE_EXT_LANES_INLINE void normalise(Vec* x, int64_t t) {
  const Vec inverse = 1.0 / root(square_of(x, t));
  for (int64_t i = 0; i < t; ++i)
    x[i] *= inverse;
}

// --- loading --------------------------------------------------------------------------------------

// Where the columns of a matrix with sides of `length` start: an odd number of vectors apart, or
// steps from column to column would all fall into the same few sets of the cache.
constexpr int64_t leading(int64_t length) {
  return length | 1;
}

// rows x columns matrices as they are: to[i * row_step + j * column_step]. The lanes beyond the
// batch hold copies of its last matrix.
template <typename T>
IMMUNIZE_EXT_LANES_INLINE void load(
    const T* a,
    int64_t rows,
    int64_t columns,
    int64_t count,
    int64_t row_step,
    int64_t column_step,
    Vec* to) {
  double* flat = reinterpret_cast<double*>(to);
  for (int64_t l = 0; l < kWidth; ++l) {
    const T* from = a + std::min(l, count - 1) * rows * columns;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        flat[(i * row_step + j * column_step) * kWidth + l] =
            static_cast<double>(from[i * columns + j]);
  }
}

// The power of two at or below the largest magnitude in a [t][ld], of which k count; lanes that
// have none within range are idle.
inline Vec scale_of(const Vec* a, int64_t t, int64_t k, Mask& idle, Vec& largest) {
  largest = Vec{};
  Vec poison = {};  // becomes NaN with any entry that is not finite
  for (int64_t j = 0; j < t; ++j)
    for (int64_t i = 0; i < k; ++i) {
      const Vec entry = a[j * leading(k) + i];
      largest = larger(magnitude(entry), largest);
      poison += entry * 0.0;
    }
  idle = ~((poison == 0.0) & (largest >= 0x1p-900) & (largest <= 0x1p900));
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<Mask>(largest) & 0x7ff0000000000000);
  return select(idle, all(1.0), power);
}

IMMUNIZE_EXT_LANES_INLINE void put(const Vec* from, int64_t count, int64_t lane, double* to) {
  const double* flat = reinterpret_cast<const double*>(from) + lane;
  for (int64_t i = 0; i < count; ++i)
    to[i] = flat[i * kWidth];
}

// --- singular values ------------------------------------------------------------------------------

// a [t][ld] <- reflectors; the bidiagonal d [t], e [t - 1].
inline void bidiagonalise(
    Vec* a, int64_t t, int64_t k, Vec* d, Vec* e, Vec* tau_left, Vec* tau_right) {
  const int64_t ld = leading(k);
  for (int64_t j = 0; j < t; ++j) {
    Vec* column = a + j * ld + j;
    reflector(column, k - j, 1, d[j], tau_left[j]);
    reflect(column, 1, tau_left[j], k - j, column + ld, 1, ld, t - j - 1);
    if (j + 1 == t)
      break;
    Vec* row = column + ld;
    if (j + 2 == t) {
      e[j] = row[0];
      tau_right[j] = Vec{};
      continue;
    }
    reflector(row, t - j - 1, ld, e[j], tau_right[j]);
    reflect(row, ld, tau_right[j], t - j - 1, row + 1, ld, 1, k - j - 1);
  }
}

// y[c] = A z[c] (k entries) and w[c] = A^T x[c] (t entries) for the tall matrix A with the columns
// a [t][ld], z [2][t] and x [2][k].
inline void multiply(
    const Vec* a, int64_t t, int64_t k, const Vec* z, const Vec* x, Vec* y, Vec* w) {
  const int64_t ld = leading(k);
  for (int64_t i = 0; i < 2 * k; ++i)
    y[i] = Vec{};
  for (int64_t j = 0; j < t; ++j) {
    const Vec z0 = z[j], z1 = z[t + j];
    Vec even[2] = {}, odd[2] = {};
    int64_t i = 0;
    for (; i + 2 <= k; i += 2) {
      const Vec first = a[j * ld + i], second = a[j * ld + i + 1];
      y[i] += first * z0;
      y[k + i] += first * z1;
      y[i + 1] += second * z0;
      y[k + i + 1] += second * z1;
      even[0] += first * x[i];
      even[1] += first * x[k + i];
      odd[0] += second * x[i + 1];
      odd[1] += second * x[k + i + 1];
    }
    if (i < k) {
      const Vec first = a[j * ld + i];
      y[i] += first * z0;
      y[k + i] += first * z1;
      even[0] += first * x[i];
      even[1] += first * x[k + i];
    }
    w[j] = even[0] + odd[0];
    w[t + j] = even[1] + odd[1];
  }
}

// |x - factor y| of vectors of m entries.
IMMUNIZE_EXT_LANES_INLINE Vec distance(const Vec* x, const Vec& factor, const Vec* y, int64_t m) {
  Vec square = {};
  for (int64_t i = 0; i < m; ++i) {
    const Vec r = x[i] - factor * y[i];
    square += r * r;
  }
  return root(square);
}

// Vectors of scratch that one group needs.
inline int64_t singular_memory(int64_t t, int64_t k) {
  return 2 * t * leading(k) + 17 * t + 4 * (t + k);
}

template <typename T>
inline void singular_group(
    const SingularBatch<T>& batch, int64_t begin, int64_t count_of, Vec* memory) {
  const int64_t n = batch.n, p = batch.p, t = std::min(n, p), k = std::max(n, p), ld = leading(k);
  const auto take = [&memory](int64_t length) {
    Vec* from = memory;
    memory += length;
    return from;
  };
  Vec *matrix = take(t * ld), *a = take(t * ld);
  // Rows of a wide matrix are the columns of a tall one.
  load(batch.a + begin * n * p, n, p, count_of, n <= p ? ld : 1, n <= p ? 1 : ld, matrix);
  Mask idle;
  Vec largest;
  const Vec scale = scale_of(matrix, t, k, idle, largest), inverse_scale = 1.0 / scale;
  for (int64_t j = 0; j < t; ++j)
    for (int64_t i = j * ld; i < j * ld + k; ++i)
      a[i] = matrix[i] = select(idle, Vec{}, matrix[i] * inverse_scale);

  Vec *d = take(t), *e = take(t), *tau_left = take(t), *tau_right = take(t);
  bidiagonalise(a, t, k, d, e, tau_left, tau_right);
  Vec *q = take(t), *f = take(t), *coupling = take(t);
  Vec before = {}, bound = {};
  for (int64_t i = 0; i < t; ++i) {
    q[i] = d[i] * d[i];
    f[i] = i + 1 < t ? e[i] * e[i] : Vec{};
    coupling[i] = i + 1 < t ? d[i] * e[i] : Vec{};
    const Vec after = magnitude(coupling[i]);
    bound = larger(q[i] + (i > 0 ? f[i - 1] : Vec{}) + before + after, bound);
    before = after;
  }
  const Factored m{t, q, f, coupling};
  Vec lambda[2] = {bound * (1.0 + 16.0 * kEps), Vec{}};
  Mask good;
  find_extremes(m, lambda, idle, good);
  good &= ~idle;

  const Policy& policy = batch.policy;
  const Vec sigma_of_b[2] = {root(lambda[0]), root(lambda[1])};
  const Vec apart = sigma_of_b[0] * (1.0 - policy.cluster_rtol);
  const Vec near = sigma_of_b[1] + policy.cluster_rtol * sigma_of_b[0];
  const Vec smallest = policy.rank_rtol * sigma_of_b[0];
  const Vec points[kPoints] = {smallest * smallest, apart * apart, near * near};
  Vec below[kPoints];
  count(m, points, below);

  Vec *z = take(2 * t), *x = take(2 * k), *scratch = take(6 * t);
  find_vectors(m, lambda, z, scratch);
  for (int64_t i = 0; i < 2 * k; ++i)
    x[i] = Vec{};
  for (int64_t i = 0; i < t; ++i) {
    x[i] = d[i] * z[i] + (i + 1 < t ? e[i] * z[i + 1] : Vec{});
    x[k + i] = (z[t + i] - (i > 0 ? e[i - 1] * x[k + i - 1] : Vec{})) / d[i];
  }
  normalise(x, t);
  normalise(x + k, t);
  for (int64_t j = t - 1; j >= 0; --j)
    reflect_some<2>(a + j * ld + j, 1, tau_left[j], k - j, x + j, 1, k);
  for (int64_t j = t - 3; j >= 0; --j)
    reflect_some<2>(a + (j + 1) * ld + j, ld, tau_right[j], t - j - 1, z + j + 1, 1, t);

  Vec *y = take(2 * k), *w = take(2 * t);
  multiply(matrix, t, k, z, x, y, w);
  const double allowed = 4.0 * std::sqrt(static_cast<double>(n + p)) * kEps;
  const double noise = 4.0 * static_cast<double>(std::max<int64_t>(t, 16)) * kEps;
  Vec sigma[2];
  Mask accurate[2];
  for (int c = 0; c < 2; ++c) {
    Vec quotient = {};
    for (int64_t i = 0; i < t; ++i)
      quotient += w[c * t + i] * z[c * t + i];
    quotient /= root(square_of(z + c * t, t) * square_of(x + c * k, k));
    const Vec error = larger(
        distance(y + c * k, quotient, x + c * k, k), distance(w + c * t, quotient, z + c * t, t));
    sigma[c] = quotient;
    const Vec size_of = sigma[0];
    accurate[c] = (error <= allowed * size_of) & (quotient > 0.0) &
                  (magnitude(quotient - sigma_of_b[c]) <= noise * size_of);
  }
  // In a cluster the vector is a mixture, and its quotient lies somewhere inside.
  const Mask mixed[2] = {static_cast<double>(t) - below[1] > 1.5, below[2] > 1.5};
  for (int c = 0; c < 2; ++c) {
    const Mask off = magnitude(sigma[c] - sigma_of_b[c]) > 8.0 * kEps * sigma_of_b[0];
    sigma[c] = select(mixed[c] & off, sigma_of_b[c], sigma[c]);
  }
  sigma[1] = sigma[1] < sigma[0] ? sigma[1] : sigma[0];

  Vec square = {};
  if (batch.thin_gram != nullptr) {
    Vec* gram = a;  // the reflectors have served
    for (int64_t i = 0; i < t; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        Vec even = {}, odd = {};
        int64_t l = 0;
        for (; l + 2 <= k; l += 2) {
          even += matrix[i * ld + l] * matrix[j * ld + l];
          odd += matrix[i * ld + l + 1] * matrix[j * ld + l + 1];
        }
        if (l < k)
          even += matrix[i * ld + l] * matrix[j * ld + l];
        const Vec entry = even + odd;
        gram[i * t + j] = gram[j * t + i] = entry;
        square += (i == j ? 1.0 : 2.0) * entry * entry;
      }
  }

  for (int64_t l = 0; l < count_of; ++l) {
    const int64_t b = begin + l;
    const int64_t missing = batch.wanted.min ? static_cast<int64_t>(below[0][l]) : 0;
    const int64_t rank = t - missing;
    const bool full = rank == policy.full_side || !policy.full_rank;
    const bool has_min = batch.wanted.min && full;
    // One route under both policies, so that what they share has the same bits.
    const bool settled = good[l] != 0 && accurate[0][l] != 0 &&
                         (!batch.wanted.min || (missing == 0 && accurate[1][l] != 0));
    batch.settled[b] = settled;
    if (!settled)
      continue;
    const double size_of = scale[l], top = sigma[0][l] * size_of;
    const double bottom = has_min ? sigma[1][l] * size_of : 0.0;
    const bool of_gram = batch.thin_gram != nullptr;
    batch.value_max[b] = of_gram ? top * top : top;
    batch.value_min[b] = of_gram ? bottom * bottom : bottom;
    batch.rank[b] = rank;
    const int64_t most = t - static_cast<int64_t>(below[1][l]);
    const int64_t least = static_cast<int64_t>(below[2][l]);
    batch.multiplicity_max[b] = std::min(std::max<int64_t>(1, most), rank);
    batch.multiplicity_min[b] = has_min ? std::max<int64_t>(1, least) : policy.full_side - rank;
    const auto vector = [l](const Vec* from, int64_t side, bool wanted, double* to) {
      if (to != nullptr && wanted)
        put(from, side, l, to);
      else if (to != nullptr)
        std::fill(to, to + side, 0.0);
    };
    const auto row = [b](double* rows, int64_t side) {
      return rows == nullptr ? nullptr : rows + b * side;
    };
    vector(z, t, batch.wanted.max, row(batch.thin_max, t));
    vector(z + t, t, has_min, row(batch.thin_min, t));
    vector(x, k, batch.wanted.max, row(batch.long_max, k));
    vector(x + k, k, has_min, row(batch.long_min, k));
    if (of_gram) {
      double* to = batch.thin_gram + b * t * t;
      put(a, t * t, l, to);
      for (int64_t i = 0; i < t * t; ++i)
        to[i] = to[i] * size_of * size_of;  // the square may overflow
      // In this order: the fourth power of the scale may overflow where F is zero.
      batch.squared_frobenius[b] = square[l] * size_of * size_of * size_of * size_of;
    }
  }
}

// --- symmetric matrices ---------------------------------------------------------------------------

// a [t][ld] <- reflectors; the tridiagonal d [t], e [t - 1]. w: [t] of scratch.
inline void tridiagonalise(Vec* a, int64_t t, Vec* d, Vec* e, Vec* tau, Vec* w) {
  const int64_t ld = leading(t);
  for (int64_t j = 0; j + 2 < t; ++j) {
    d[j] = a[j * ld + j];
    Vec* v = a + j * ld + j + 1;
    const int64_t m = t - j - 1;
    reflector(v, m, 1, e[j], tau[j]);
    Vec* rest = a + (j + 1) * ld + j + 1;
    Vec along = {};
    for (int64_t c = 0; c < m; c += 4) {
      const int64_t some = std::min<int64_t>(4, m - c);
      Vec sum[4] = {};
      if (some == 4) {
        for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r)
            sum[r] += rest[(c + r) * ld + i] * v[i];
      } else {
        for (int64_t r = 0; r < some; ++r)
          for (int64_t i = 0; i < m; ++i)
            sum[r] += rest[(c + r) * ld + i] * v[i];
      }
      for (int64_t r = 0; r < some; ++r) {
        w[c + r] = tau[j] * sum[r];
        along += w[c + r] * v[c + r];
      }
    }
    const Vec half = -0.5 * tau[j] * along;
    for (int64_t i = 0; i < m; ++i)
      w[i] += half * v[i];
    for (int64_t c = 0; c < m; ++c) {
      const Vec vc = v[c], wc = w[c];
      for (int64_t i = 0; i < m; ++i)
        rest[c * ld + i] -= vc * w[i] + wc * v[i];
    }
  }
  if (t > 1) {
    d[t - 2] = a[(t - 2) * ld + t - 2];
    e[t - 2] = a[(t - 2) * ld + t - 1];
  }
  d[t - 1] = a[(t - 1) * ld + t - 1];
}

inline int64_t symmetric_memory(int64_t t) {
  return 2 * t * leading(t) + 20 * t;
}

template <typename T>
inline void symmetric_group(
    const SymmetricBatch<T>& batch, int64_t begin, int64_t count_of, Vec* memory) {
  const int64_t t = batch.t, ld = leading(t);
  const auto take = [&memory](int64_t length) {
    Vec* from = memory;
    memory += length;
    return from;
  };
  Vec *matrix = take(t * ld), *a = take(t * ld);
  load(batch.h + begin * t * t, t, t, count_of, ld, 1, a);
  Mask idle;
  Vec largest;
  const Vec scale = scale_of(a, t, t, idle, largest), inverse_scale = 1.0 / scale;
  Vec asymmetry = {};
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const Vec here = select(idle, Vec{}, a[i * ld + j] * inverse_scale);
      const Vec mirrored = select(idle, Vec{}, a[j * ld + i] * inverse_scale);
      asymmetry = larger(magnitude(here - mirrored), asymmetry);
      matrix[i * ld + j] = matrix[j * ld + i] = 0.5 * here + 0.5 * mirrored;
    }
  idle |= ~(asymmetry <= batch.allowed * (largest * inverse_scale));
  std::copy(matrix, matrix + t * ld, a);

  Vec *d = take(t), *e = take(t), *tau = take(t), *w = take(t);
  tridiagonalise(a, t, d, e, tau, w);
  Vec low = d[0], high = d[0], before = {};
  for (int64_t i = 0; i < t; ++i) {
    const Vec after = i + 1 < t ? magnitude(e[i]) : Vec{};
    low = -larger(before + after - d[i], -low);
    high = larger(d[i] + before + after, high);
    before = after;
  }
  // A little lower: the last pivot must not be rounding.
  low -= 0x1p-8 * larger(high, -low);
  Vec *q = take(t), *f = take(t);
  for (int64_t i = 0; i < t; ++i) {
    q[i] = d[i] - low - (i > 0 ? f[i - 1] : Vec{});
    f[i] = i + 1 < t ? e[i] * e[i] / q[i] : Vec{};
  }
  const Factored m{t, q, f, e};
  Vec mu[2] = {(high - low) * (1.0 + 16.0 * kEps), Vec{}};
  Mask good;
  find_extremes(m, mu, idle, good);
  good &= ~idle;
  const Vec top = low + mu[0], bottom = low + mu[1];
  const Vec norm = larger(magnitude(top), magnitude(bottom));
  const Vec near = batch.cluster_rtol * norm;
  const Vec points[kPoints] = {mu[0] - near, mu[1] + near, mu[1] + near};
  Vec below[kPoints];
  count(m, points, below);

  Vec *z = take(2 * t), *scratch = take(6 * t), *image = take(2 * t);
  find_vectors(m, mu, z, scratch);
  for (int64_t j = t - 3; j >= 0; --j)
    reflect_some<2>(a + j * ld + j + 1, 1, tau[j], t - j - 1, z + j + 1, 1, t);
  for (int64_t j = 0; j < t; ++j) {
    Vec sum[2] = {};
    for (int64_t i = 0; i < t; ++i) {
      sum[0] += matrix[j * ld + i] * z[i];
      sum[1] += matrix[j * ld + i] * z[t + i];
    }
    image[j] = sum[0];
    image[t + j] = sum[1];
  }
  const double noise = 4.0 * static_cast<double>(std::max<int64_t>(t, 16)) * kEps;
  Vec lambda[2];
  for (int c = 0; c < 2; ++c) {
    Vec quotient = {};
    for (int64_t i = 0; i < t; ++i)
      quotient += image[c * t + i] * z[c * t + i];
    quotient /= square_of(z + c * t, t);
    lambda[c] = quotient;
    const Vec found = c == 0 ? top : bottom;
    good &= (distance(image + c * t, quotient, z + c * t, t) <= noise * norm) &
            (magnitude(quotient - found) <= noise * norm);
  }
  const Mask mixed[2] = {static_cast<double>(t) - below[0] > 1.5, below[1] > 1.5};
  for (int c = 0; c < 2; ++c) {
    const Vec found = c == 0 ? top : bottom;
    const Mask off = magnitude(lambda[c] - found) > 8.0 * kEps * norm;
    lambda[c] = select(mixed[c] & off, found, lambda[c]);
  }
  lambda[1] = lambda[1] < lambda[0] ? lambda[1] : lambda[0];
  for (int64_t l = 0; l < count_of; ++l) {
    const int64_t b = begin + l;
    batch.settled[b] = good[l] != 0;
    if (good[l] == 0)
      continue;
    batch.lambda_max[b] = lambda[0][l] * scale[l];
    batch.lambda_min[b] = lambda[1][l] * scale[l];
    batch.multiplicity_max[b] = std::max<int64_t>(1, t - static_cast<int64_t>(below[0][l]));
    batch.multiplicity_min[b] = std::max<int64_t>(1, static_cast<int64_t>(below[1][l]));
    put(z, t, l, batch.v_max + b * t);
    put(z + t, t, l, batch.v_min + b * t);
  }
}

// --- batches --------------------------------------------------------------------------------------

// Scratch for `vectors` vectors, aligned.
class Memory {
 public:
  explicit Memory(int64_t vectors) : bytes_((vectors + 1) * sizeof(Vec)) {}
  Vec* get() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<Vec*>((address + sizeof(Vec) - 1) / sizeof(Vec) * sizeof(Vec));
  }

 private:
  std::vector<char> bytes_;
};

template <typename T>
void extremes(const SingularBatch<T>& batch, int64_t begin, int64_t end) {
  Memory memory(singular_memory(std::min(batch.n, batch.p), std::max(batch.n, batch.p)));
  for (; begin < end; begin += kWidth)
    singular_group(batch, begin, std::min(kWidth, end - begin), memory.get());
}

template <typename T>
void extremes(const SymmetricBatch<T>& batch, int64_t begin, int64_t end) {
  Memory memory(symmetric_memory(batch.t));
  for (; begin < end; begin += kWidth)
    symmetric_group(batch, begin, std::min(kWidth, end - begin), memory.get());
}

#undef IMMUNIZE_EXT_LANES_INLINE
