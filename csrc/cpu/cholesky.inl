// Cholesky factor of a symmetric matrix, and its solves and products with a panel of 12 vectors.
// Torch-free.
//
// Everything is made of the register tiles of dense_products.inl. A panel holds 12 vectors,
// panel[k * 12 + c], so that a product or a solve with 12 vectors reads the matrix once: for large
// matrices it costs little more than one with a single vector. Sums run in an order that neither
// the number of threads nor the other vectors of the panel change.
//
// Matrices have a side that is a multiple of 12 (padded), so nothing has a remainder.

constexpr int64_t kFactorBlock = 96;

inline double dot(const double* x, const double* y, int64_t length) {
  Vec4 acc[2] = {};
  int64_t j = 0;
  for (; j + 8 <= length; j += 8) {
    for (int s = 0; s < 2; ++s) {
      Vec4 a, b;
      load(a, x + j + 4 * s);
      load(b, y + j + 4 * s);
      acc[s] += a * b;
    }
  }
  double sum = horizontal_sum(acc[0] + acc[1]);
  for (; j < length; ++j)
    sum += x[j] * y[j];
  return sum;
}

// Four unknowns of L x = b for 12 vectors; l is their diagonal block. c holds b less what the
// unknowns before contribute, and becomes -x: the sign with which a tile subtracts it elsewhere.
inline void forward_four(const double* l, int64_t ld, double* c) {
  for (int64_t r = 0; r < 4; ++r) {
    const double divisor = -l[r * ld + r];
    for (int64_t s = 0; s < kPanel; s += 4) {
      Vec4 x;
      load(x, c + r * kPanel + s);
      for (int64_t q = 0; q < r; ++q) {
        Vec4 known;
        load(known, c + q * kPanel + s);
        x += l[r * ld + q] * known;
      }
      store(c + r * kPanel + s, x / divisor);
    }
  }
}

// The same for L^T x = b.
inline void backward_four(const double* l, int64_t ld, double* c) {
  for (int64_t r = 3; r >= 0; --r) {
    const double divisor = -l[r * ld + r];
    for (int64_t s = 0; s < kPanel; s += 4) {
      Vec4 x;
      load(x, c + r * kPanel + s);
      for (int64_t q = r + 1; q < 4; ++q) {
        Vec4 known;
        load(known, c + q * kPanel + s);
        x += l[q * ld + r] * known;
      }
      store(c + r * kPanel + s, x / divisor);
    }
  }
}

inline bool factor_diagonal(double* m, int64_t ld, int64_t side) {
  for (int64_t i = 0; i < side; ++i) {
    double* row = m + i * ld;
    for (int64_t j = 0; j < i; ++j)
      row[j] = (row[j] - dot(row, m + j * ld, j)) / m[j * ld + j];
    const double pivot = row[i] - dot(row, row, i);
    // Not <=, or a NaN would pass.
    if (!(pivot > 0.0))
      return false;
    row[i] = std::sqrt(pivot);
  }
  return true;
}

// The lower triangle of m (side a multiple of 12) becomes its Cholesky factor. False: not positive
// definite. The upper triangle is not read; what stands there afterwards has no meaning.
template <typename Run>
bool cholesky(double* m, int64_t side, const Run& run) {
  const int64_t ld = side;
  std::vector<double> negative(side * kFactorBlock), positive(side * kFactorBlock);
  for (int64_t k0 = 0; k0 < side; k0 += kFactorBlock) {
    const int64_t width = std::min(kFactorBlock, side - k0), first = k0 + width;
    const double* corner = m + k0 * ld + k0;
    if (!factor_diagonal(m + k0 * ld + k0, ld, width))
      return false;
    const int64_t panels = (side - first) / kPanel;
    // Rows below: X L^T = A, twelve rows of X at a time as a panel of unknowns.
    run(panels, std::max<int64_t>(1, 200000 / (kPanel * width * width)),
        [&](int64_t begin, int64_t end) {
          for (int64_t panel = begin; panel < end; ++panel) {
            double* rows = m + (first + panel * kPanel) * ld + k0;
            double* minus = negative.data() + panel * kPanel * width;
            double* plus = positive.data() + panel * kPanel * width;
            for (int64_t r = 0; r < kPanel; ++r)
              for (int64_t k = 0; k < width; ++k)
                minus[k * kPanel + r] = rows[r * ld + k];
            for (int64_t j = 0; j < width; j += 4) {
              tile(corner + j * ld, ld, 1, minus, j, minus + j * kPanel, kPanel);
              forward_four(corner + j * ld + j, ld, minus + j * kPanel);
            }
            for (int64_t k = 0; k < kPanel * width; ++k)
              plus[k] = -minus[k];
            for (int64_t r = 0; r < kPanel; ++r)
              for (int64_t k = 0; k < width; ++k)
                rows[r * ld + k] = plus[k * kPanel + r];
          }
        });
    // What remains, less X X^T: 12 x 12 blocks on or below the diagonal, numbered row by row.
    const int64_t blocks = panels * (panels + 1) / 2;
    run(blocks, std::max<int64_t>(1, 400000 / (kPanel * kPanel * width)),
        [&](int64_t begin, int64_t end) {
          int64_t row =
              static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(begin) + 1.0) - 1.0) / 2.0);
          while (row * (row + 1) / 2 > begin)
            --row;
          while ((row + 1) * (row + 2) / 2 <= begin)
            ++row;
          int64_t column = begin - row * (row + 1) / 2;
          for (int64_t block = begin; block < end;) {
            double* to = m + (first + row * kPanel) * ld + first + column * kPanel;
            const double* left = negative.data() + row * kPanel * width;
            const double* right = positive.data() + column * kPanel * width;
            const bool two = column < row && block + 1 < end;
            for (int64_t r = 0; r < kPanel; r += kRows) {
              if (two)
                two_tiles(
                    left + r, 1, kPanel, right, right + kPanel * width, width, to + r * ld, ld);
              else
                tile(left + r, 1, kPanel, right, width, to + r * ld, ld);
            }
            block += two ? 2 : 1;
            column += two ? 2 : 1;
            if (column > row) {
              ++row;
              column = 0;
            }
          }
        });
  }
  return true;
}

// y <- (L L^T)^-1 y for the 12 vectors of a panel.
template <typename Run>
void solve_panel(const double* l, int64_t side, double* y, const Run& run) {
  const int64_t ld = side;
  for (int64_t k0 = 0; k0 < side; k0 += kFactorBlock) {
    const int64_t width = std::min(kFactorBlock, side - k0);
    run(width / 4, std::max<int64_t>(1, 100000 / (4 * kPanel * (k0 + 1))),
        [&](int64_t begin, int64_t end) {
          for (int64_t g = begin; g < end; ++g)
            tile(l + (k0 + 4 * g) * ld, ld, 1, y, k0, y + (k0 + 4 * g) * kPanel, kPanel);
        });
    for (int64_t j = k0; j < k0 + width; j += 4) {
      tile(l + j * ld + k0, ld, 1, y + k0 * kPanel, j - k0, y + j * kPanel, kPanel);
      forward_four(l + j * ld + j, ld, y + j * kPanel);
    }
  }
  for (int64_t k = 0; k < side * kPanel; ++k)
    y[k] = -y[k];
  for (int64_t k0 = (side - 1) / kFactorBlock * kFactorBlock; k0 >= 0; k0 -= kFactorBlock) {
    const int64_t end_row = std::min(k0 + kFactorBlock, side);
    for (int64_t j = end_row - 4; j >= k0; j -= 4) {
      const int64_t after = j + 4;
      tile(l + after * ld + j, 1, ld, y + after * kPanel, end_row - after, y + j * kPanel, kPanel);
      backward_four(l + j * ld + j, ld, y + j * kPanel);
    }
    run(k0 / 4, std::max<int64_t>(1, 100000 / (4 * kPanel * kFactorBlock)),
        [&](int64_t begin, int64_t end) {
          for (int64_t g = begin; g < end; ++g)
            tile(
                l + k0 * ld + 4 * g, 1, ld, y + k0 * kPanel, end_row - k0, y + 4 * g * kPanel,
                kPanel);
        });
  }
  for (int64_t k = 0; k < side * kPanel; ++k)
    y[k] = -y[k];
}

// out = h x for the 12 vectors of a panel; h in full.
template <typename Run>
void multiply_panel(const double* h, int64_t side, const double* x, double* out, const Run& run) {
  std::fill(out, out + side * kPanel, 0.0);
  run(side / 4, std::max<int64_t>(1, 100000 / (4 * kPanel * side)),
      [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g)
          tile(h + 4 * g * side, side, 1, x, side, out + 4 * g * kPanel, kPanel);
      });
}
