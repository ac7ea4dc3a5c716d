// Reduction of a symmetric matrix to tridiagonal form, and vectors back. Torch-free.
//
// Householder: for i = t-1 .. 1 the reflector H_i = I - tau v v^T, v supported on [0, i) with
// v[i-1] = 1, maps the part of row i left of the diagonal to a multiple of its last unit vector.
// With
//   q = tau A v,  w = q - (tau v^T q / 2) v,  H A H = A - v w^T - w v^T  on the leading i x i part,
// so that G = Q T Q^T with Q = H_{t-1} ... H_1.
//
// Both the update and the product A v read the whole remaining matrix, which is what limits the
// speed. Here they share one pass: row i-1 of the updated matrix, and with it the next reflector,
// is formed first; then each row is updated and, while it is in registers, multiplied with the next
// v. The matrix is kept in full, rows padded with finite numbers that meet zeros in v and w.

// g: t x t with leading dimension ld, a multiple of 4 with at least ld rows; lost.
// d[t], e[t-1]: T.   v: t x ld, row i holds the reflector of row i.   tau[t].   work: 3 ld.
struct Reduction {
  int64_t t, ld;
  double *g, *d, *e, *v, *tau, *work;
  bool two_stages = false;  // band.inl: g then keeps the reflectors of the second
};

// The reflector that maps x (length i) to (0, .., 0, beta). Returns beta, writes v (zero beyond i).
inline double reflector(const double* x, int64_t i, int64_t ld, double* v, double* tau) {
  std::memset(v, 0, sizeof(double) * ld);
  const double alpha = x[i - 1];
  double square = 0.0;
  for (int64_t j = 0; j + 1 < i; ++j)
    square += x[j] * x[j];
  if (square == 0.0) {
    *tau = 0.0;
    return alpha;
  }
  const double beta = -std::copysign(std::sqrt(alpha * alpha + square), alpha);
  const double inverse = 1.0 / (alpha - beta);
  for (int64_t j = 0; j + 1 < i; ++j)
    v[j] = x[j] * inverse;
  v[i - 1] = 1.0;
  *tau = (beta - alpha) / beta;
  return beta;
}

// g -= v w^T + w v^T on the leading side x side part, and y = g next (the updated g), for the
// groups [begin, end) of four rows.
inline void update_and_multiply(
    double* g,
    int64_t ld,
    int64_t side,
    int64_t begin,
    int64_t end,
    const double* v,
    const double* w,
    const double* next,
    double* y) {
  const int64_t width = (side + 3) / 4 * 4;
  for (int64_t i = 4 * begin; i < 4 * end; i += 4) {
    double* row = g + i * ld;
    Vec4 acc[4] = {};
    for (int64_t j = 0; j < width; j += 4) {
      Vec4 vj, wj, nj;
      load(vj, v + j);
      load(wj, w + j);
      load(nj, next + j);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        Vec4 a;
        load(a, row + r * ld + j);
        a -= v[i + r] * wj;
        a -= w[i + r] * vj;
        store(row + r * ld + j, a);
        acc[r] += a * nj;
      }
    }
    for (int r = 0; r < 4; ++r)
      y[i + r] = horizontal_sum(acc[r]);
  }
}

// The same for the leading m.t x m.t part in one pass a reflector.
// run(count, grain, f) calls f(begin, end) over [0, count) in slices of at least grain.
template <typename Run>
void reduce_by_passes(const Reduction& m, const Run& run) {
  const int64_t t = m.t, ld = m.ld;
  double *w = m.work, *y = w + ld, *zero = y + ld;
  std::memset(m.work, 0, sizeof(double) * 3 * ld);
  m.d[t - 1] = m.g[(t - 1) * ld + t - 1];
  if (t == 1)
    return;
  const double* v = zero;  // the update that is pending: none before the first
  for (int64_t i = t - 1; i >= 1; --i) {
    double* row = m.g + i * ld;
    // Bring row i up to date; its diagonal entry is final now.
    const double vi = v[i], wi = w[i];
    for (int64_t j = 0; j <= i; ++j)
      row[j] -= vi * w[j] + wi * v[j];
    m.d[i] = row[i];
    double* next = m.v + i * ld;
    m.e[i - 1] = reflector(row, i, ld, next, m.tau + i);
    const int64_t groups = (i + 3) / 4;
    // A slice below about 25 microseconds is not worth a thread.
    run(groups, std::max<int64_t>(1, 100000 / (16 * groups)), [&](int64_t begin, int64_t end) {
      update_and_multiply(m.g, ld, i, begin, end, v, w, next, y);
    });
    const double tau = m.tau[i];
    double along = 0.0;
    for (int64_t j = 0; j < i; ++j)
      along += next[j] * y[j];
    const double alpha = -0.5 * tau * tau * along;
    for (int64_t j = 0; j < i; ++j)
      w[j] = tau * y[j] + alpha * next[j];
    std::memset(w + i, 0, sizeof(double) * (ld - i));
    v = next;
  }
  m.d[0] = m.g[0] - 2.0 * v[0] * w[0];
}

// y += the part of g v that the groups [begin, end) of four rows of the lower triangle give, each
// entry below the diagonal used on both sides of it.
inline void multiply_lower(
    const double* g, int64_t ld, int64_t begin, int64_t end, const double* v, double* y) {
  for (int64_t i = 4 * begin; i < 4 * end; i += 4) {
    Vec4 acc[4] = {};
    for (int64_t j = 0; j < i; j += 4) {
      Vec4 right, below;
      load(right, v + j);
      load(below, y + j);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        Vec4 a;
        load(a, g + (i + r) * ld + j);
        acc[r] += a * right;
        below += v[i + r] * a;
      }
      store(y + j, below);
    }
    for (int r = 0; r < 4; ++r) {
      double sum = horizontal_sum(acc[r]);
      for (int c = 0; c < 4; ++c)
        sum += (c <= r ? g[(i + r) * ld + i + c] : g[(i + c) * ld + i + r]) * v[i + c];
      y[i + r] += sum;
    }
  }
}

// Beyond this side the matrix no longer stays in cache from one reflector to the next.
constexpr int64_t kPassSide = 700;
constexpr int64_t kBlock = 32;

// Slices of one product with the lower triangle, each with a result of its own: a fixed number, so
// that the order of summation does not depend on the threads.
constexpr int64_t kSlices = 8;

// g -> T by blocks of kBlock reflectors while the matrix is large: the updates -v w^T - w v^T of a
// block are left pending, subtracted from each row as it is needed and from each product with v,
// and applied together as one product of depth 2 kBlock. A reflector then costs one reading of the
// lower triangle, a quarter of the traffic of the passes above.
template <typename Run>
void reduce_by_blocks(const Reduction& m, const Run& run) {
  const int64_t ld = m.ld;
  int64_t side = m.t;
  std::vector<double> pending, partial, left, right;
  for (; side > kPassSide; side -= kBlock) {
    pending.assign(kBlock * ld, 0.0);  // w_q; v_q are rows of m.v
    double* y = m.work;
    for (int64_t k = 0; k < kBlock; ++k) {
      const int64_t i = side - 1 - k;
      double* row = m.g + i * ld;
      for (int64_t q = 0; q < k; ++q) {
        const double *v = m.v + (side - 1 - q) * ld, *w = pending.data() + q * ld;
        const double vi = v[i], wi = w[i];
        for (int64_t j = 0; j <= i; ++j)
          row[j] -= vi * w[j] + wi * v[j];
      }
      m.d[i] = row[i];
      double* next = m.v + i * ld;
      m.e[i - 1] = reflector(row, i, ld, next, m.tau + i);
      const int64_t groups = (i + 3) / 4;
      const auto slice_end = [groups](int64_t slice) {  // slices of equal area
        const double share = static_cast<double>(slice) / static_cast<double>(kSlices);
        return static_cast<int64_t>(static_cast<double>(groups) * std::sqrt(share));
      };
      partial.assign(kSlices * ld, 0.0);
      run(kSlices, 1, [&](int64_t begin, int64_t end) {
        for (int64_t slice = begin; slice < end; ++slice)
          multiply_lower(
              m.g, ld, slice_end(slice), slice + 1 == kSlices ? groups : slice_end(slice + 1), next,
              partial.data() + slice * ld);
      });
      std::copy(partial.begin(), partial.begin() + ld, y);
      for (int64_t slice = 1; slice < kSlices; ++slice)
        for (int64_t j = 0; j < i; ++j)
          y[j] += partial[slice * ld + j];
      for (int64_t q = 0; q < k; ++q) {
        const double *v = m.v + (side - 1 - q) * ld, *w = pending.data() + q * ld;
        double along_v = 0.0, along_w = 0.0;
        for (int64_t j = 0; j < i; ++j) {
          along_v += v[j] * next[j];
          along_w += w[j] * next[j];
        }
        for (int64_t j = 0; j < i; ++j)
          y[j] -= v[j] * along_w + w[j] * along_v;
      }
      const double tau = m.tau[i];
      double along = 0.0;
      for (int64_t j = 0; j < i; ++j)
        along += next[j] * y[j];
      const double alpha = -0.5 * tau * tau * along;
      double* w = pending.data() + k * ld;
      for (int64_t j = 0; j < i; ++j)
        w[j] = tau * y[j] + alpha * next[j];
    }
    // What is left of the lower triangle, minus all that is pending: tiles of depth 2 kBlock.
    const int64_t rest = side - kBlock, panels = panels_of(rest), quads = (rest + 3) / 4;
    left.assign(4 * quads * 2 * kBlock, 0.0);
    right.assign(panels * 2 * kBlock * kPanel, 0.0);
    for (int64_t q = 0; q < kBlock; ++q) {
      const double *v = m.v + (side - 1 - q) * ld, *w = pending.data() + q * ld;
      for (int64_t i = 0; i < rest; ++i) {
        left[i * 2 * kBlock + q] = -v[i];
        left[i * 2 * kBlock + kBlock + q] = -w[i];
        double* to = right.data() + (i / kPanel) * 2 * kBlock * kPanel + i % kPanel;
        to[q * kPanel] = w[i];
        to[(kBlock + q) * kPanel] = v[i];
      }
    }
    run(panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t i = 3 * panel; i < quads; ++i)
          tile(
              left.data() + i * 4 * 2 * kBlock, 2 * kBlock, 1,
              right.data() + panel * 2 * kBlock * kPanel, 2 * kBlock,
              m.g + 4 * i * ld + panel * kPanel, ld);
    });
  }
  if (side < m.t)
    mirror(m.g, side, ld);
  Reduction inner = m;
  inner.t = side;
  reduce_by_passes(inner, run);
}

inline void reflect(const double* v, double tau, int64_t length, double* x) {
  Vec4 acc = {};
  for (int64_t j = 0; j < length; j += 4) {
    Vec4 a, b;
    load(a, v + j);
    load(b, x + j);
    acc += a * b;
  }
  const double factor = tau * horizontal_sum(acc);
  for (int64_t j = 0; j < length; j += 4) {
    Vec4 a, b;
    load(a, v + j);
    load(b, x + j);
    store(x + j, b - factor * a);
  }
}

// Four rows x_r of ld entries <- (I - tau v v^T) x_r, v of `length` entries, a multiple of 4.
inline void reflect_four(const double* v, double tau, int64_t length, double* x, int64_t ld) {
  Vec4 acc[4] = {};
  for (int64_t j = 0; j < length; j += 4) {
    Vec4 a, b;
    load(a, v + j);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      load(b, x + r * ld + j);
      acc[r] += a * b;
    }
  }
  double factor[4];
  for (int r = 0; r < 4; ++r)
    factor[r] = tau * horizontal_sum(acc[r]);
  for (int64_t j = 0; j < length; j += 4) {
    Vec4 a, b;
    load(a, v + j);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      load(b, x + r * ld + j);
      store(x + r * ld + j, b - factor[r] * a);
    }
  }
}
