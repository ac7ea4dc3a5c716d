// Inner products of per-sample gradients J_i = sum_t g_it a_it^T of a linear layer; formulas in
// ../khatri_rao.cpp. Torch-free.
//
// Two routes. By pairs of tokens: blocks of A A^T and G G^T, 96 rows by 24, are formed, multiplied
// and added up; no product is stored further than its block. By outer products: blocks of J, some
// columns of a at a time for all samples, and their symmetric product. With t tokens a pair of
// samples costs t^2 (d + o) products in the first and d o in the second.
//
// Rows are samples, or tokens of samples one after the other. "Packed" rows stand in panels of 12,
// an even number of them; "wide" ones in rows of a multiple of 24 numbers, a multiple of 24 of them,
// zeros behind.
//
// Every number of an output is added up by one thread in a fixed order.

// Panels [begin, end) of rows of `depth` numbers.
inline void pack_rows(
    const double* a, int64_t rows, int64_t depth, int64_t begin, int64_t end, double* packed) {
  for (int64_t panel = begin; panel < end; ++panel) {
    double* to = packed + panel * kPanel * depth;
    const int64_t used = std::clamp<int64_t>(rows - panel * kPanel, 0, kPanel);
    if (used < kPanel)
      std::memset(to, 0, sizeof(double) * kPanel * depth);
    for (int64_t r = 0; r < used; ++r) {
      const double* from = a + (panel * kPanel + r) * depth;
      for (int64_t k = 0; k < depth; ++k)
        to[k * kPanel + r] = from[k];
    }
  }
}

// out (4 groups x 24) = packed rows from 4 first on times those of the panels `panel` and the next.
inline void row_products(
    const double* packed,
    int64_t depth,
    int64_t first,
    int64_t groups,
    int64_t panel,
    double* out) {
  std::memset(out, 0, sizeof(double) * groups * kRows * kTwoPanels);
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int64_t steps = std::min(kDepth, depth - k0);
    const double* right = packed + (panel * depth + k0) * kPanel;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t i = first + g;
      const double* left = packed + ((i / 3) * depth + k0) * kPanel + (i % 3) * kRows;
      two_tiles(
          left, 1, kPanel, right, right + depth * kPanel, steps, out + g * kRows * kTwoPanels,
          kTwoPanels);
    }
  }
}

// --- by pairs of tokens ---------------------------------------------------------------------------

// Rows of the samples [begin, end) of K (n x n, zero before) on and below the diagonal. a, g packed.
inline void pair_products(
    int64_t n,
    int64_t t,
    const double* a,
    int64_t d,
    const double* g,
    int64_t o,
    double bias,
    int64_t begin,
    int64_t end,
    double* k) {
  std::vector<double> scratch(2 * kPairRows * kTwoPanels);
  double *of_a = scratch.data(), *of_g = of_a + kPairRows * kTwoPanels;
  for (int64_t r0 = begin * t; r0 < end * t; r0 += kPairRows) {
    const int64_t r1 = std::min(r0 + kPairRows, end * t), groups = (r1 - r0 + kRows - 1) / kRows;
    const int64_t columns = ((r1 - 1) / t + 1) * t;
    for (int64_t c0 = 0; c0 < columns; c0 += kTwoPanels) {
      row_products(a, d, r0 / kRows, groups, c0 / kPanel, of_a);
      row_products(g, o, r0 / kRows, groups, c0 / kPanel, of_g);
      for (int64_t r = r0; r < r1; ++r) {
        const double* x = of_a + (r - r0) * kTwoPanels;
        const double* y = of_g + (r - r0) * kTwoPanels;
        const int64_t i = r / t, c1 = std::min(c0 + kTwoPanels, (i + 1) * t);
        double* row = k + i * n;
        if (t == 1) {
          for (int64_t c = c0; c < c1; ++c)
            row[c] = (x[c - c0] + bias) * y[c - c0];
          continue;
        }
        for (int64_t c = c0; c < c1;) {
          const int64_t j = c / t, stop = std::min(c1, (j + 1) * t);
          double sum = 0.0;
          for (; c < stop; ++c)
            sum += (x[c - c0] + bias) * y[c - c0];
          row[j] += sum;
        }
      }
    }
  }
}

// Rows of `sum` (wide) += weights (4 groups x 24) times 24 rows of x (wide), both of `width` numbers.
inline void add_weighted_rows(
    const double* weights, int64_t groups, const double* x, int64_t width, double* sum) {
  for (int64_t j = 0; j < width; j += kTwoPanels)
    for (int64_t g = 0; g < groups; ++g)
      two_tiles(
          weights + g * kRows * kTwoPanels, kTwoPanels, 1, x + j, x + j + kPanel, kTwoPanels,
          sum + g * kRows * width + j, width, width);
}

// The rows of samples [begin, end) of both gradients; h (n x n).
inline void pair_gradients(
    int64_t n,
    int64_t t,
    const double* h,
    const PairOperand& a,
    const PairOperand& g,
    double bias,
    int64_t begin,
    int64_t end) {
  std::vector<double> scratch(2 * kPairRows * kTwoPanels);
  double *of_a = scratch.data(), *of_g = of_a + kPairRows * kTwoPanels;
  for (int64_t r0 = begin * t; r0 < end * t; r0 += kPairRows) {
    const int64_t r1 = std::min(r0 + kPairRows, end * t), groups = (r1 - r0 + kRows - 1) / kRows;
    for (int64_t c0 = 0; c0 < n * t; c0 += kTwoPanels) {
      // H~ o M, with zeros beside it.
      const auto weigh = [&](double* m, double added) {
        const int64_t c1 = std::min(c0 + kTwoPanels, n * t);
        for (int64_t r = r0; r < r0 + groups * kRows; ++r) {
          double* row = m + (r - r0) * kTwoPanels;
          const double* weights = h + r / t * n;
          int64_t c = c0;
          if (r < r1 && t == 1)
            for (; c < c1; ++c)
              row[c - c0] = weights[c] * (row[c - c0] + added);
          while (r < r1 && c < c1) {
            const int64_t j = c / t, stop = std::min(c1, (j + 1) * t);
            for (; c < stop; ++c)
              row[c - c0] = weights[j] * (row[c - c0] + added);
          }
          std::fill(row + (c - c0), row + kTwoPanels, 0.0);
        }
      };
      if (a.gradient != nullptr) {
        row_products(g.packed, g.side, r0 / kRows, groups, c0 / kPanel, of_g);
        weigh(of_g, 0.0);
        const int64_t width = widened(a.side);
        add_weighted_rows(of_g, groups, a.wide + c0 * width, width, a.gradient + r0 * width);
      }
      if (g.gradient != nullptr) {
        row_products(a.packed, a.side, r0 / kRows, groups, c0 / kPanel, of_a);
        weigh(of_a, bias);
        const int64_t width = widened(g.side);
        add_weighted_rows(of_a, groups, g.wide + c0 * width, width, g.gradient + r0 * width);
      }
    }
  }
}

// --- by outer products ----------------------------------------------------------------------------

// Columns [first, first + count) of a, count a multiple of 4, of all J_i^T of samples [begin, end):
// rows of count * widened(o) numbers, zero before. a, g wide.
inline void outer_products(
    int64_t t,
    const double* a,
    int64_t a_width,
    const double* g,
    int64_t g_width,
    int64_t first,
    int64_t count,
    int64_t begin,
    int64_t end,
    double* j) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t c = 0; c < count; c += kRows)
      for (int64_t x = 0; x < g_width; x += kTwoPanels)
        two_tiles(
            a + i * t * a_width + first + c, 1, a_width, g + i * t * g_width + x,
            g + i * t * g_width + x + kPanel, t, j + (i * count + c) * g_width + x, g_width,
            g_width);
}

// Rows [begin, end), begin a multiple of 4, of K (n x n) on and below the diagonal += J J^T. J packed.
inline void add_gram_rows(
    int64_t n, const double* j, int64_t depth, int64_t begin, int64_t end, double* k) {
  std::vector<double> block(kPairRows * kTwoPanels);
  for (int64_t r0 = begin; r0 < end; r0 += kPairRows) {
    const int64_t r1 = std::min(r0 + kPairRows, end), groups = (r1 - r0 + kRows - 1) / kRows;
    for (int64_t c0 = 0; c0 < r1; c0 += kTwoPanels) {
      row_products(j, depth, r0 / kRows, groups, c0 / kPanel, block.data());
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t c = c0; c < std::min(c0 + kTwoPanels, r + 1); ++c)
          k[r * n + c] += block[(r - r0) * kTwoPanels + c - c0];
    }
  }
}

// Columns [begin, end) / 24 of out = h x: h (4 groups x n, zero rows behind), x and out of `width`
// numbers a row; out zero before.
inline void multiply_pairs(
    const double* h,
    int64_t groups,
    int64_t n,
    const double* x,
    int64_t width,
    int64_t begin,
    int64_t end,
    double* out) {
  for (int64_t j = begin * kTwoPanels; j < end * kTwoPanels; j += kTwoPanels)
    for (int64_t k0 = 0; k0 < n; k0 += kDepth)
      for (int64_t g = 0; g < groups; ++g)
        two_tiles(
            h + g * kRows * n + k0, n, 1, x + k0 * width + j, x + k0 * width + j + kPanel,
            std::min(kDepth, n - k0), out + g * kRows * width + j, width, width);
}

// What dJ (rows of count * g_width numbers) adds to both gradients of samples [begin, end); null
// where not wanted. All wide.
inline void outer_gradients(
    int64_t t,
    const double* dj,
    const double* a,
    int64_t a_width,
    const double* g,
    int64_t g_width,
    int64_t first,
    int64_t count,
    int64_t begin,
    int64_t end,
    double* of_a,
    double* of_g) {
  const int64_t groups = (t + kRows - 1) / kRows, wide = widened(count);
  std::vector<double> turned(of_a != nullptr ? g_width * wide : 0);
  std::vector<double> sum(groups * kRows * std::max(wide, g_width));
  for (int64_t i = begin; i < end; ++i) {
    const double* own = dj + i * count * g_width;
    const double *tokens = a + i * t * a_width, *back = g + i * t * g_width;
    if (of_a != nullptr) {  // G_i dJ_i
      for (int64_t c = 0; c < count; ++c)
        for (int64_t x = 0; x < g_width; ++x)
          turned[x * wide + c] = own[c * g_width + x];
      std::memset(sum.data(), 0, sizeof(double) * groups * kRows * wide);
      for (int64_t c = 0; c < wide; c += kTwoPanels)
        for (int64_t r = 0; r < groups * kRows; r += kRows)
          two_tiles(
              back + r * g_width, g_width, 1, turned.data() + c, turned.data() + c + kPanel,
              g_width, sum.data() + r * wide + c, wide, wide);
      for (int64_t r = 0; r < t; ++r)
        std::memcpy(
            of_a + (i * t + r) * a_width + first, sum.data() + r * wide, sizeof(double) * count);
    }
    if (of_g != nullptr) {  // A_i dJ_i^T, of these columns of A_i
      std::memset(sum.data(), 0, sizeof(double) * groups * kRows * g_width);
      for (int64_t x = 0; x < g_width; x += kTwoPanels)
        for (int64_t r = 0; r < groups * kRows; r += kRows)
          two_tiles(
              tokens + first + r * a_width, a_width, 1, own + x, own + x + kPanel, count,
              sum.data() + r * g_width + x, g_width, g_width);
      for (int64_t r = 0; r < t; ++r)
        for (int64_t x = 0; x < g_width; ++x)
          of_g[(i * t + r) * g_width + x] += sum[r * g_width + x];
    }
  }
}
