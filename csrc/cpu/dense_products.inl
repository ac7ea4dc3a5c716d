// Products of the spectrum operators, in float64 whatever the entries are. Torch-free.
//
//   add_symmetric_product   g += s s^T, s the thin side of a (t x k): lower triangle by tiles
//   multiply_left           out = m x    (t x t) (t x p), of some rows of x and out
//   multiply_right          out = x m    (n x t) (t x t), of some columns
//   multiply_vectors        out = A z    for many vectors z, A = a or a^T
//   combine_rows            y = u^T a    for one or two vectors u
//   combine_columns         y = a v      for one or two vectors v
//
// One register tile serves all of the first four: 4 rows by a panel of 12 columns (three vectors),
// both packed or strided, over a depth of 128; where vectors hold eight numbers, by two panels at
// once. A symmetric product packs only one operand, since a panel of 12 holds three groups of 4
// rows. Only tiles on or below the diagonal are computed: half the arithmetic of a general product.
//
// Every tile is summed over the whole depth in a fixed order, whoever computes it. So a result
// depends neither on the number of threads nor on what else stands in a batch.

// c (4 x 12, row stride ldc) += a b with a[r * a_row + k * a_step] and b[k * b_step + j].
inline void tile(
    const double* a,
    int64_t a_row,
    int64_t a_step,
    const double* b,
    int64_t depth,
    double* c,
    int64_t ldc,
    int64_t b_step = kPanel) {
#if IMMUNIZE_EXT_REGISTER_BYTES == 16
  for (int64_t first = 0; first < kPanel; first += 4) {
    Vec2 acc[kRows][2] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vec2 right[2];
      load(right[0], b + k * b_step + first);
      load(right[1], b + k * b_step + first + 2);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const double left = a[r * a_row + k * a_step];
        acc[r][0] += left * right[0];
        acc[r][1] += left * right[1];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        double* to = c + r * ldc + first + 2 * h;
        Vec2 old;
        load(old, to);
        store(to, old + acc[r][h]);
      }
  }
#else
  Vec4 acc[kRows][3] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec4 right[3];
#pragma GCC unroll 4
    for (int j = 0; j < 3; ++j)
      load(right[j], b + k * b_step + 4 * j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const double left = a[r * a_row + k * a_step];
#pragma GCC unroll 4
      for (int j = 0; j < 3; ++j)
        acc[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 3; ++j) {
      Vec4 old;
      load(old, c + r * ldc + 4 * j);
      store(c + r * ldc + 4 * j, old + acc[r][j]);
    }
  }
#endif
}

// The same for two panels, b and next, whose columns are neighbours in c. No bit differs.
inline void two_tiles(
    const double* a,
    int64_t a_row,
    int64_t a_step,
    const double* b,
    const double* next,
    int64_t depth,
    double* c,
    int64_t ldc,
    int64_t b_step = kPanel) {
#if IMMUNIZE_EXT_VEC8
  Vec8 acc[kRows][3] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec8 right[3];
    load(right[0], b + k * b_step);
    load(right[1], b + k * b_step + 8, next + k * b_step);
    load(right[2], next + k * b_step + 4);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const double left = a[r * a_row + k * a_step];
#pragma GCC unroll 4
      for (int j = 0; j < 3; ++j)
        acc[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 3; ++j) {
      Vec8 old;
      load(old, c + r * ldc + 8 * j);
      store(c + r * ldc + 8 * j, old + acc[r][j]);
    }
  }
#else
  tile(a, a_row, a_step, b, depth, c, ldc, b_step);
  tile(a, a_row, a_step, next, depth, c + kPanel, ldc, b_step);
#endif
}

// One panel of 12 thin indices at the depths [k0, k0 + depth): out[k * 12 + r].
template <typename T>
inline void pack_panel(const Thin<T>& thin, int64_t first, int64_t k0, int64_t depth, double* out) {
  const int64_t used = std::min(kPanel, thin.side() - first);
  if (used < kPanel)
    std::memset(out, 0, sizeof(double) * kPanel * depth);
  if (!thin.left()) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = thin.a + (k0 + k) * thin.p + first;
      for (int64_t r = 0; r < used; ++r)
        out[k * kPanel + r] = static_cast<double>(from[r]);
    }
    return;
  }
  int64_t r = 0;
  for (; r + 4 <= used; r += 4) {
    const T* from = thin.a + (first + r) * thin.p + k0;
    int64_t k = 0;
#if IMMUNIZE_EXT_SHUFFLES
    for (; k + 4 <= depth; k += 4) {
      Vec4 row[4];
      for (int64_t s = 0; s < 4; ++s)
        load(row[s], from + s * thin.p + k);
      transpose(row[0], row[1], row[2], row[3]);
      for (int64_t s = 0; s < 4; ++s)
        store(out + (k + s) * kPanel + r, row[s]);
    }
#endif
    for (; k < depth; ++k)
      for (int64_t s = 0; s < 4; ++s)
        out[k * kPanel + r + s] = static_cast<double>(from[s * thin.p + k]);
  }
  for (; r < used; ++r)
    for (int64_t k = 0; k < depth; ++k)
      out[k * kPanel + r] = static_cast<double>(thin.a[(first + r) * thin.p + k0 + k]);
}

// Units [begin, end) of g += s s^T; g is padded(t) square and zero before the first call. A unit is a
// group of 4 rows by two panels, in the order of the pairs (symmetric_units).
// packed: scratch, panels * 12 * 128.
template <typename T>
inline void add_symmetric_product(
    const Thin<T>& thin, int64_t begin, int64_t end, double* packed, double* g) {
  const int64_t panels = panels_of(thin.side()), ld = panels * kPanel;
  // The first pair of the range, whose index bounds the rows needed from below.
  int64_t first_panel = 0, offset = begin;
  while (first_panel < panels && offset >= 3 * (panels - first_panel)) {
    offset -= 3 * (panels - first_panel);
    first_panel += 2;
  }
  for (int64_t k0 = 0; k0 < thin.length(); k0 += kDepth) {
    const int64_t depth = std::min(kDepth, thin.length() - k0);
    for (int64_t j = first_panel; j < panels; ++j)
      pack_panel(thin, j * kPanel, k0, depth, packed + j * kPanel * kDepth);
    int64_t panel = first_panel, row = offset;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t i = 3 * panel + row;  // group of 4 rows
      const double* left = packed + (i / 3) * kPanel * kDepth + (i % 3) * kRows;
      const double* right = packed + panel * kPanel * kDepth;
      double* to = g + i * kRows * ld + panel * kPanel;
      // Beside its own rows the second panel lies above the diagonal.
      if (row < 3)
        tile(left, 1, kPanel, right, depth, to, ld);
      else
        two_tiles(left, 1, kPanel, right, right + kPanel * kDepth, depth, to, ld);
      if (++row == 3 * (panels - panel)) {
        row = 0;
        panel += 2;
      }
    }
  }
}

// Columns [12 begin, 12 end) of out = m x in the rows `kept` (t of them) of x and out; m is t x t
// with leading dimension ldm.
template <typename T>
inline void multiply_left(
    const double* m,
    int64_t ldm,
    const T* x,
    const int64_t* kept,
    int64_t t,
    int64_t p,
    int64_t begin,
    int64_t end,
    T* out) {
  constexpr int64_t width = 2 * kPanel;
  std::vector<double> scratch(width * (t + padded(t)));
  double *packed = scratch.data(), *next = packed + kPanel * t, *result = packed + width * t;
  for (int64_t panel = begin; panel < end; panel += 2) {
    const bool two = panel + 1 < end;
    const int64_t first = panel * kPanel;
    const int64_t used = std::min(two ? width : kPanel, p - first);
    if constexpr (std::is_same_v<T, double>) {
      // Nothing to widen, to leave out or to pad: without copies, while a page for each row is not
      // too many.
      constexpr int64_t few = 96;
      if (used == width && t <= few && kept[t - 1] == t - 1 && t % kRows == 0) {
        for (int64_t i = 0; i < t; ++i)
          std::memset(out + i * p + first, 0, sizeof(double) * width);
        for (int64_t i = 0; i < t; i += kRows)
          two_tiles(
              m + i * ldm, ldm, 1, x + first, x + first + kPanel, t, out + i * p + first, p, p);
        continue;
      }
    }
    if (used < width)
      std::memset(packed, 0, sizeof(double) * width * t);
    std::memset(result, 0, sizeof(double) * width * padded(t));
    for (int64_t k = 0; k < t; ++k) {
      const T* row = x + kept[k] * p + first;
      for (int64_t j = 0; j < std::min(used, kPanel); ++j)
        packed[k * kPanel + j] = static_cast<double>(row[j]);
      for (int64_t j = kPanel; j < used; ++j)
        next[k * kPanel + j - kPanel] = static_cast<double>(row[j]);
    }
    for (int64_t i = 0; i < t; i += kRows) {
      if (two)
        two_tiles(m + i * ldm, ldm, 1, packed, next, t, result + i * width, width);
      else
        tile(m + i * ldm, ldm, 1, packed, t, result + i * width, width);
    }
    for (int64_t i = 0; i < t; ++i)
      for (int64_t j = 0; j < used; ++j)
        out[kept[i] * p + first + j] = static_cast<T>(result[i * width + j]);
  }
}

// Rows [begin, end) of out = x m in the columns `kept` (t of them) of x and out, which have p; from
// the packed m.
template <typename T>
inline void multiply_right(
    const T* x,
    int64_t p,
    const double* packed,
    const int64_t* kept,
    int64_t t,
    int64_t begin,
    int64_t end,
    T* out) {
  constexpr int64_t depth_block = kDepth;
  const int64_t ld = padded(t), panels = panels_of(t);
  std::vector<double> scratch(kRowBlock * (depth_block + ld));
  double* left = scratch.data();
  double* result = left + kRowBlock * depth_block;
  for (int64_t i0 = begin; i0 < end; i0 += kRowBlock) {
    const int64_t height = std::min(kRowBlock, end - i0);
    std::memset(scratch.data(), 0, sizeof(double) * scratch.size());
    for (int64_t k0 = 0; k0 < t; k0 += depth_block) {
      const int64_t depth = std::min(depth_block, t - k0);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t k = 0; k < depth; ++k)
          left[i * depth_block + k] = static_cast<double>(x[(i0 + i) * p + kept[k0 + k]]);
      for (int64_t panel = 0; panel < panels; panel += 2) {
        const double* right = packed + (panel * t + k0) * kPanel;
        for (int64_t i = 0; i < height; i += kRows) {
          const double* rows = left + i * depth_block;
          double* to = result + i * ld + panel * kPanel;
          if (panel + 1 < panels)
            two_tiles(rows, depth_block, 1, right, right + t * kPanel, depth, to, ld);
          else
            tile(rows, depth_block, 1, right, depth, to, ld);
        }
      }
    }
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < t; ++j)
        out[(i0 + i) * p + kept[j]] = static_cast<T>(result[i * ld + j]);
  }
}

// Blocks [begin, end) of kRowBlock rows of out = A z, A (rows x depth) with entries
// a[i * row + k * step], one of row and step being 1; z (depth x m), m a multiple of 12.
template <typename T>
inline void multiply_vectors(
    const T* a,
    int64_t row,
    int64_t step,
    int64_t rows,
    int64_t depth,
    const double* z,
    int64_t m,
    int64_t begin,
    int64_t end,
    double* out) {
  std::vector<double> scratch(kRowBlock * (kDepth + m));
  double *packed = scratch.data(), *result = packed + kRowBlock * kDepth;
  for (int64_t i0 = begin * kRowBlock; i0 < std::min(end * kRowBlock, rows); i0 += kRowBlock) {
    const int64_t height = std::min(kRowBlock, rows - i0);
    std::memset(scratch.data(), 0, sizeof(double) * scratch.size());
    for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
      const int64_t width = std::min(kDepth, depth - k0);
      const T* from = a + i0 * row + k0 * step;
      const bool along = step == 1;
      const int64_t lines = along ? height : width, used = along ? width : height;
      const int64_t from_line = along ? row : step, to_line = along ? kDepth : kRowBlock;
      for (int64_t line = 0; line < lines; ++line)
        for (int64_t i = 0; i < used; ++i)
          packed[line * to_line + i] = static_cast<double>(from[line * from_line + i]);
      const int64_t left_row = along ? kDepth : 1, left_step = along ? 1 : kRowBlock;
      for (int64_t i = 0; i < height; i += kRows)
        for (int64_t j = 0; j < m; j += 2 * kPanel) {
          const double *left = packed + i * left_row, *right = z + k0 * m + j;
          double* to = result + i * m + j;
          if (j + kPanel < m)
            two_tiles(left, left_row, left_step, right, right + kPanel, width, to, m, m);
          else
            tile(left, left_row, left_step, right, width, to, m, m);
        }
    }
    std::memcpy(out + i0 * m, result, sizeof(double) * height * m);
  }
}

// y_c (length p) += sum over rows [begin, end) of u_c[i] a_i for C vectors. Not inlined: with a
// constant number of rows gcc warns of overflow in the remainder loop that it then finds dead.
template <typename T, int C>
__attribute__((noinline)) void combine_rows(
    const T* a, int64_t p, int64_t begin, int64_t end, const double* const* u, double* const* y) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    const T* row = a + i * p;
    int64_t j = 0;
    for (; j + 4 <= p; j += 4) {
      Vec4 entry[4];
      for (int r = 0; r < 4; ++r)
        load(entry[r], row + r * p + j);
      for (int c = 0; c < C; ++c) {
        Vec4 sum;
        load(sum, y[c] + j);
        sum += (u[c][i] * entry[0] + u[c][i + 1] * entry[1]) +
               (u[c][i + 2] * entry[2] + u[c][i + 3] * entry[3]);
        store(y[c] + j, sum);
      }
    }
    for (; j < p; ++j)
      for (int c = 0; c < C; ++c)
        y[c][j] += (u[c][i] * row[j] + u[c][i + 1] * row[p + j]) +
                   (u[c][i + 2] * row[2 * p + j] + u[c][i + 3] * row[3 * p + j]);
  }
  for (; i < end; ++i)
    for (int c = 0; c < C; ++c)
      for (int64_t j = 0; j < p; ++j)
        y[c][j] += u[c][i] * static_cast<double>(a[i * p + j]);
}

// y_c[i] = a_i . v_c for rows [begin, end) and C vectors.
template <typename T, int C>
inline void combine_columns(
    const T* a, int64_t p, int64_t begin, int64_t end, const double* const* v, double* const* y) {
  for (int64_t i = begin; i < end; ++i) {
    const T* row = a + i * p;
    Vec4 acc[C][4] = {};
    int64_t j = 0;
    for (; j + 16 <= p; j += 16) {
      for (int s = 0; s < 4; ++s) {
        Vec4 entry;
        load(entry, row + j + 4 * s);
        for (int c = 0; c < C; ++c) {
          Vec4 right;
          load(right, v[c] + j + 4 * s);
          acc[c][s] += entry * right;
        }
      }
    }
    for (int c = 0; c < C; ++c) {
      double sum = horizontal_sum((acc[c][0] + acc[c][1]) + (acc[c][2] + acc[c][3]));
      for (int64_t r = j; r < p; ++r)
        sum += static_cast<double>(row[r]) * v[c][r];
      y[c][i] = sum;
    }
  }
}
