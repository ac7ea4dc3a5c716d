// Resolvents B = (T + k I)^-1 of a tridiagonal matrix. Torch-free.
//
// The pivots of T + k I and their derivatives in k,
//   p_i = t_i + k - e_{i-1}^2 / p_{i-1},   r = e_{i-1} / p_{i-1},
//   p_i' = 1 + r^2 p_{i-1}',   p_i'' = r^2 (p_{i-1}'' - 2 p_{i-1}'^2 / p_{i-1}),
// give, from log det = sum log p_i,
//   tr B = sum p_i' / p_i,   tr B^2 = sum (p_i' / p_i)^2 - p_i'' / p_i,
// and with w_i = p_i - k p_i' = t_i - r^2 (p_{i-1} + k p_{i-1}'), which does not cancel for large k,
//   tr T B = t - k tr B = sum w_i / p_i,
//   tr T^2 B^2 = t - 2 k tr B + k^2 tr B^2 = sum (w_i / p_i)^2 - k^2 p_i'' / p_i,   p_i'' <= 0.
// So every shift costs O(t), and no eigenvalue is computed.

// False if T + k I is not positive definite.
inline bool resolvent_traces(
    int64_t t, const double* d, const double* e, double k, double* first, double* second) {
  double pivot = d[0] + k, slope = 1.0, bend = 0.0, rest = d[0];
  double sum = 0.0, squares = 0.0;
  for (int64_t i = 0;; ++i) {
    if (!(pivot > 0.0))
      return false;
    const double share = rest / pivot;
    sum += share;
    squares += share * share - k * (k * bend / pivot);
    if (i + 1 == t)
      break;
    const double r = e[i] / pivot;
    rest = d[i + 1] - r * r * (pivot + k * slope);
    bend = r * r * (bend - 2.0 * slope * slope / pivot);
    slope = 1.0 + r * r * slope;
    pivot = d[i + 1] + k - e[i] * r;
  }
  *first = sum;
  *second = squares;
  return true;
}

// T + k I = L D L^T: 1 / D and the entries of L below the diagonal.
inline void factor_shifted(
    int64_t t, const double* d, const double* e, double k, double* inverse, double* below) {
  double pivot = d[0] + k;
  for (int64_t i = 0; i < t; ++i) {
    inverse[i] = 1.0 / pivot;
    below[i] = i + 1 < t ? e[i] * inverse[i] : 0.0;
    if (i + 1 < t)
      pivot = d[i + 1] + k - e[i] * below[i];
  }
}

// x [t, kColumns] <- B x; rows before `first` of x are zero on entry.
inline void solve_columns(
    int64_t t, const double* inverse, const double* below, int64_t first, double* x) {
  // The row before stays in registers: to wait for its store costs more than the arithmetic.
  double last[kColumns] = {};
  for (int64_t i = first; i < t; ++i) {
    const double factor = i > first ? below[i - 1] : 0.0;
    double* row = x + i * kColumns;
    for (int64_t c = 0; c < kColumns; ++c) {
      last[c] = row[c] - factor * last[c];
      row[c] = last[c];
    }
  }
  for (int64_t c = 0; c < kColumns; ++c)
    last[c] = 0.0;
  for (int64_t i = t - 1; i >= 0; --i) {
    const double factor = below[i], scale = i < first ? 0.0 : inverse[i];
    double* row = x + i * kColumns;
    for (int64_t c = 0; c < kColumns; ++c) {
      last[c] = scale * row[c] - factor * last[c];
      row[c] = last[c];
    }
  }
}

inline void solve_vector(int64_t t, const double* inverse, const double* below, double* x) {
  for (int64_t i = 1; i < t; ++i)
    x[i] -= below[i - 1] * x[i - 1];
  for (int64_t i = 0; i < t; ++i)
    x[i] *= inverse[i];
  for (int64_t i = t - 2; i >= 0; --i)
    x[i] -= below[i] * x[i + 1];
}

// Columns [begin, end) / kColumns of sum_s square[s] B_s^2 + cube[s] B_s^3, on and below the
// diagonal, added to m (t x t); traces[block, s, 3]: what they hold of tr B, tr B^2, tr B^3.
// inverse, below: [shifts, t]. work: t * kColumns.
inline void resolvent_powers(
    int64_t t,
    int64_t shifts,
    const double* inverse,
    const double* below,
    const double* square,
    const double* cube,
    int64_t begin,
    int64_t end,
    double* m,
    double* traces,
    double* work) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t j0 = block * kColumns, width = std::min(kColumns, t - j0);
    for (int64_t s = 0; s < shifts; ++s) {
      double* sums = traces + (block * shifts + s) * 3;
      if (square[s] == 0.0 && cube[s] == 0.0)
        continue;
      std::memset(work, 0, sizeof(double) * t * kColumns);
      for (int64_t c = 0; c < width; ++c)
        work[(j0 + c) * kColumns + c] = 1.0;
      for (int power = 1; power <= 3; ++power) {
        solve_columns(t, inverse + s * t, below + s * t, power == 1 ? j0 : 0, work);
        for (int64_t c = 0; c < width; ++c)
          sums[power - 1] += work[(j0 + c) * kColumns + c];
        const double weight = power == 1 ? 0.0 : power == 2 ? square[s] : cube[s];
        if (weight == 0.0)
          continue;
        for (int64_t i = j0; i < t; ++i)
          for (int64_t c = 0; c < width; ++c)
            m[i * t + j0 + c] += weight * work[i * kColumns + c];
      }
    }
  }
}

// Rows 4 [begin, end) of Q^T, rows (t rounded up to 4) x ld: row j is Q e_j, on which the reflectors
// up to j do nothing.
inline void form_rows(const Reduction& m, int64_t begin, int64_t end, double* rows) {
  for (int64_t group = begin; group < end; ++group) {
    double* x = rows + 4 * group * m.ld;
    std::memset(x, 0, sizeof(double) * 4 * m.ld);
    for (int64_t r = 0; r < 4 && 4 * group + r < m.t; ++r)
      x[r * m.ld + 4 * group + r] = 1.0;
    for (int64_t i = 4 * group + 1; i < m.t; ++i)
      if (m.tau[i] != 0.0)
        reflect_four(m.v + i * m.ld, m.tau[i], (i + 3) / 4 * 4, x, m.ld);
  }
}

// a (t x t) = basis^T T basis: d[t], e[t] with a zero at the end, basis [t, t].
// memory: 2 ld^2 + 6 ld, ld = padded(t); zeros.
template <typename Run>
void tridiagonal_form(
    const double* a,
    int64_t t,
    double* d,
    double* e,
    double* basis,
    double* memory,
    const Run& run) {
  const int64_t ld = padded(t);
  double *g = memory, *v = g + ld * ld, *small = v + ld * ld;
  const Reduction m{t, ld, g, small, small + ld, v, small + 2 * ld, small + 3 * ld};
  for (int64_t i = 0; i < t; ++i)
    std::memcpy(g + i * ld, a + i * t, sizeof(double) * t);
  reduce_by_blocks(m, run);
  std::memcpy(d, m.d, sizeof(double) * t);
  std::memcpy(e, m.e, sizeof(double) * (t - 1));
  e[t - 1] = 0.0;
  // The reduced matrix has gone: the rows of Q^T take its place.
  const int64_t groups = (t + 3) / 4;
  run(groups, std::max<int64_t>(1, 100000 / (8 * t * t)),
      [&](int64_t begin, int64_t end) { form_rows(m, begin, end, g); });
  for (int64_t j = 0; j < t; ++j)
    std::memcpy(basis + j * t, g + j * ld, sizeof(double) * t);
}
