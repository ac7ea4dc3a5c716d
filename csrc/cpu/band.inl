// Reduction of a large symmetric matrix to tridiagonal form in two stages. Torch-free.
//
// One reflector after the other (tridiagonal.inl) spends half of its 4/3 t^3 operations on products
// of the remaining matrix with a single vector, at the speed of memory. Here (Bischof, Lang and Sun,
// "A framework for symmetric band reduction", ACM TOMS 26, 2000)
//
// 1. G = Q1 B Q1^T, B with b = kBand entries beside the diagonal. b rows at a time are reduced, from
//    the last on: reflectors H_q = I - tau_q v_q^T v_q (v_q: rows), of which b make one block
//      Q = H_0 .. H_{b-1} = I - V^T T V,  T upper triangular,
//    and with Z = A V^T,  W = Z T - 1/2 V^T T^T (V Z) T,
//      Q^T A Q = A - W V - V^T W^T
//    on the rows and columns before them: products of depth t and 2 b, all of register tiles.
// 2. B = Q2 T Q2^T, chased: a reflector of b entries clears a column below its first off-diagonal
//    entry, which fills a block b further down, whose first column the next reflector clears, to the
//    end of the matrix. 6 t^2 b operations on a band that stays in cache.
//
// Both are products of reflectors: the error is a few eps |G|, as it is in one stage.

constexpr int64_t kBand = 24;
constexpr int64_t kBoth = 2 * kBand;

// A column of the band: the diagonal, kBand entries below it and as many that a chase fills, and room
// for the lanes of a vector that lie above the diagonal.
constexpr int64_t kBandColumn = kBoth + 8;

#if IMMUNIZE_EXT_VEC8
using Wide = Vec8;
typedef int64_t Lanes __attribute__((vector_size(64)));
constexpr Lanes kLanes = {0, 1, 2, 3, 4, 5, 6, 7};

// The sum of each of eight vectors.
__attribute__((always_inline)) inline void sum_each(const Vec8* x, Vec8& sums) {
  Vec8 two[4], four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    two[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
             __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
#pragma GCC unroll 4
  for (int i = 0; i < 2; ++i)
    four[i] = __builtin_shufflevector(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  sums = __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

__attribute__((always_inline)) inline double horizontal_sum(const Vec8& v) {
  return horizontal_sum(
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
#elif IMMUNIZE_EXT_REGISTER_BYTES == 16
using Wide = Vec2;
typedef int64_t Lanes __attribute__((vector_size(16)));
constexpr Lanes kLanes = {0, 1};

__attribute__((always_inline)) inline void sum_each(const Vec2* x, Vec2& sums) {
  sums = Vec2{horizontal_sum(x[0]), horizontal_sum(x[1])};
}
#else
using Wide = Vec4;
using Lanes = Count4;
constexpr Lanes kLanes = {0, 1, 2, 3};

__attribute__((always_inline)) inline void sum_each(const Vec4* x, Vec4& sums) {
  sums =
      Vec4{horizontal_sum(x[0]), horizontal_sum(x[1]), horizontal_sum(x[2]), horizontal_sum(x[3])};
}
#endif
constexpr int64_t kWide = sizeof(Wide) / sizeof(double);
constexpr int64_t kWides = kBand / kWide;

// Rows [side - kBand, side) of g: reflectors from the last row on, into rows of m.v, supported on
// [0, row - kBand] with a 1 in the last place; the rows become those of the band.
inline void factor_panel(const Reduction& m, int64_t side) {
  const int64_t ld = m.ld, first = side - kBand;
  for (int64_t row = side - 1; row >= first; --row) {
    const int64_t length = row - kBand + 1;
    double* v = m.v + row * ld;
    m.tau[row] = 0.0;
    if (length < 2) {
      std::memset(v, 0, sizeof(double) * ld);
      continue;
    }
    m.g[row * ld + length - 1] = reflector(m.g + row * ld, length, ld, v, m.tau + row);
    if (m.tau[row] == 0.0)
      continue;
    const int64_t whole = (length + 3) / 4 * 4;
    int64_t other = first;
    for (; other + 4 <= row; other += 4)
      reflect_four(v, m.tau[row], whole, m.g + other * ld, ld);
    for (; other < row; ++other)
      reflect(v, m.tau[row], whole, m.g + other * ld);
  }
}

// T of the block of reflectors of the rows before `side`, [kBand, kBand]; packed: V^T, [t, kBand].
inline void block_factor(const Reduction& m, int64_t side, const double* packed, double* factor) {
  const int64_t depth = side - kBand;
  double products[kBand * kBand] = {};  // v_q . v_r
  for (int64_t q = 0; q < kBand; q += kRows)
    two_tiles(
        m.v + (side - 1 - q) * m.ld, -m.ld, 1, packed, packed + kPanel, depth, products + q * kBand,
        kBand, kBand);
  std::fill(factor, factor + kBand * kBand, 0.0);
  for (int64_t q = 0; q < kBand; ++q) {
    const double tau = m.tau[side - 1 - q];
    factor[q * kBand + q] = tau;
    for (int64_t i = 0; i < q; ++i) {
      double sum = 0.0;
      for (int64_t l = i; l < q; ++l)
        sum += factor[i * kBand + l] * products[l * kBand + q];
      factor[i * kBand + q] = -tau * sum;
    }
  }
}

// Units [begin, end) of g -= W V + V^T W^T in the order of symmetric_units, both triangles but for
// blocks of two panels on the diagonal, whose lower one alone is right.
// left [side, kBoth]: (-W, -V^T); right, in panels: (V; W^T).
inline void update_units(
    double* g,
    int64_t ld,
    int64_t side,
    const double* left,
    const double* right,
    int64_t begin,
    int64_t end) {
  const int64_t panels = panels_of(side);
  int64_t panel = 0, row = begin;
  while (row >= 3 * (panels - panel)) {
    row -= 3 * (panels - panel);
    panel += 2;
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = kRows * (3 * panel + row), j = panel * kPanel;
    const double* from = right + panel * kBoth * kPanel;
    double* to = g + i * ld + j;
    const bool two = row >= 3;
    if (two)
      two_tiles(left + i * kBoth, kBoth, 1, from, from + kBoth * kPanel, kBoth, to, ld);
    else
      tile(left + i * kBoth, kBoth, 1, from, kBoth, to, ld);
    if (row >= 6)
      for (int64_t c = 0; c < kBand; c += 4) {
        double* across = g + (j + c) * ld + i;
#if IMMUNIZE_EXT_SHUFFLES
        Vec4 x[4];
        for (int64_t r = 0; r < 4; ++r)
          load(x[r], to + r * ld + c);
        transpose(x[0], x[1], x[2], x[3]);
        for (int64_t r = 0; r < 4; ++r)
          store(across + r * ld, x[r]);
#else
        for (int64_t r = 0; r < 4; ++r)
          for (int64_t s = 0; s < 4; ++s)
            across[s * ld + r] = to[r * ld + c + s];
#endif
      }
    if (++row == 3 * (panels - panel)) {
      row = 0;
      panel += 2;
    }
  }
}

// g -> the lower triangle of B, reflectors and their factors in m.v and m.tau.
template <typename Run>
void reduce_to_band(const Reduction& m, const Run& run) {
  constexpr int64_t b = kBand;
  const int64_t ld = m.ld;
  std::vector<double> memory((3 * b + 2 * kBoth) * ld);  // in panels of whole rows
  double *packed = memory.data(), *z = packed + b * ld, *w = z + b * ld;
  double *left = w + b * ld, *right = left + kBoth * ld;
  for (int64_t row = 0; row <= std::min(b, m.t - 1); ++row) {
    m.tau[row] = 0.0;
    std::memset(m.v + row * ld, 0, sizeof(double) * ld);
  }
  for (int64_t side = m.t; side > b + 1; side -= b) {
    const int64_t rest = side - b, quads = (rest + 3) / 4, panels = panels_of(rest);
    factor_panel(m, side);
    const double* last = m.v + (side - 1) * ld;  // v_0; those after it stand before it
    for (int64_t j = 0; j < panels * kPanel; ++j)
      for (int64_t q = 0; q < b; ++q)
        packed[j * b + q] = last[j - q * ld];
    double factor[b * b], core[b * b] = {}, turned[b * b] = {}, half[b * b] = {};
    block_factor(m, side, packed, factor);
    // Z = A V^T. A slice below about 25 microseconds is not worth a thread.
    std::fill(z, z + panels * kPanel * b, 0.0);
    run(quads, std::max<int64_t>(1, 5000 / rest), [&](int64_t begin, int64_t end) {
      for (int64_t k0 = 0; k0 < rest; k0 += kDepth)
        for (int64_t i = 4 * begin; i < 4 * end; i += 4)
          two_tiles(
              m.g + i * ld + k0, ld, 1, packed + k0 * b, packed + k0 * b + kPanel,
              std::min(kDepth, rest - k0), z + i * b, b, b);
    });
    std::fill(z + rest * b, z + panels * kPanel * b, 0.0);
    // W = Z T - 1/2 V^T T^T (V Z) T.
    for (int64_t q = 0; q < b; q += kRows)
      two_tiles(last - q * ld, -ld, 1, z, z + kPanel, rest, core + q * b, b, b);
    for (int64_t q = 0; q < b; q += kRows)
      two_tiles(core + q * b, b, 1, factor, factor + kPanel, b, turned + q * b, b, b);
    for (int64_t q = 0; q < b; q += kRows)
      two_tiles(factor + q, 1, b, turned, turned + kPanel, b, half + q * b, b, b);
    for (double& x : half)
      x *= -0.5;
    std::fill(w, w + panels * kPanel * b, 0.0);
    run(panels, 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kPanel; i < end * kPanel; i += kRows) {
        two_tiles(z + i * b, b, 1, factor, factor + kPanel, b, w + i * b, b, b);
        two_tiles(packed + i * b, b, 1, half, half + kPanel, b, w + i * b, b, b);
      }
      for (int64_t i = begin * kPanel; i < end * kPanel; ++i)
        for (int64_t q = 0; q < b; ++q) {
          left[i * kBoth + q] = -w[i * b + q];
          left[i * kBoth + b + q] = -packed[i * b + q];
        }
      for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t q = 0; q < b; ++q) {
          double* to = right + (panel * kBoth + q) * kPanel;
          const int64_t first = panel * kPanel;
          std::memcpy(to, last - q * ld + first, sizeof(double) * kPanel);
          for (int64_t r = 0; r < kPanel; ++r)
            to[b * kPanel + r] = w[(first + r) * b + q];
        }
    });
    run(symmetric_units(rest), 200,
        [&](int64_t begin, int64_t end) { update_units(m.g, ld, rest, left, right, begin, end); });
    for (int64_t j = 0; j < panels * kPanel; j += b)
      mirror(m.g + j * ld + j, std::min(b, panels * kPanel - j), ld);
  }
}

// kBand numbers in registers.
struct Column {
  Wide part[kWides];
};

__attribute__((always_inline)) inline Column load_column(const double* from) {
  Column x;
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k)
    load(x.part[k], from + k * kWide);
  return x;
}

__attribute__((always_inline)) inline void store_column(double* to, const Column& x) {
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k)
    store(to + k * kWide, x.part[k]);
}

__attribute__((always_inline)) inline double product_of(const Column& x, const Column& y) {
  Wide sum = {};
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k)
    sum += x.part[k] * y.part[k];
  return horizontal_sum(sum);
}

// x (kBand entries) -> u with (I - u u^T) x = (beta, 0, .., 0). Returns beta.
inline double head_reflector(const double* x, double* u) {
  Column v = load_column(x);
  const double alpha = x[0];
  v.part[0] = kLanes > 0 ? v.part[0] : Wide{};
  const double square = product_of(v, v);
  if (square == 0.0) {
    store_column(u, Column{});
    return alpha;
  }
  const double beta = -std::copysign(std::sqrt(alpha * alpha + square), alpha);
  // v = x - beta e_1, |v|^2 = 2 beta (beta - alpha), u = v sqrt(2) / |v|.
  const double scale = 1.0 / std::sqrt(beta * (beta - alpha));
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k)
    v.part[k] *= scale;
  store_column(u, v);
  u[0] = (alpha - beta) * scale;
  return beta;
}

// Columns of a block of the band lie this far apart.
constexpr int64_t kBandStep = kBandColumn - 1;

// A block on the diagonal from both sides, D <- H D H with H = I - u u^T. Of D the lower triangle is
// there, so each entry below the diagonal serves two sums.
inline void turn_both_sides(double* d, const double* u) {
  const Column v = load_column(u);
  Column product = {};
  alignas(64) double across[kBand];
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k) {  // columns [k kWide, (k + 1) kWide)
    Wide sums[kWide];
#pragma GCC unroll 12
    for (int64_t c = 0; c < kWide; ++c) {
      const double* column = d + (k * kWide + c) * kBandStep;
      const double factor = u[k * kWide + c];
      Wide x;
      load(x, column + k * kWide);
      product.part[k] += (kLanes >= c ? x : Wide{}) * factor;
      sums[c] = (kLanes > c ? x : Wide{}) * v.part[k];
#pragma GCC unroll 12
      for (int64_t below = k + 1; below < kWides; ++below) {
        load(x, column + below * kWide);
        product.part[below] += x * factor;
        sums[c] += x * v.part[below];
      }
    }
    Wide row;
    sum_each(sums, row);
    store(across + k * kWide, row);
  }
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k) {
    Wide x;
    load(x, across + k * kWide);
    product.part[k] += x;
  }
  // D - u w^T - w u^T with w = D u - (u^T D u / 2) u.
  const double along = 0.5 * product_of(product, v);
  alignas(64) double w[kBand];
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k)
    product.part[k] -= along * v.part[k];
  store_column(w, product);
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k)
    for (int64_t j = k * kWide; j < (k + 1) * kWide; ++j)
#pragma GCC unroll 12
      for (int64_t below = k; below < kWides; ++below) {
        double* entry = d + j * kBandStep + below * kWide;
        Wide x;
        load(x, entry);
        store(entry, x - u[j] * product.part[below] - w[j] * v.part[below]);
      }
}

// The block below: B <- B H, of which H' = I - next next^T then clears the first column.
inline void turn_below(double* block, const double* u, double* next) {
  Column sum = {}, other = {};  // B u; two chains of additions
  for (int64_t j = 0; j < kBand; j += 2) {
    const Column x = load_column(block + j * kBandStep),
                 y = load_column(block + (j + 1) * kBandStep);
#pragma GCC unroll 12
    for (int64_t k = 0; k < kWides; ++k) {
      sum.part[k] += x.part[k] * u[j];
      other.part[k] += y.part[k] * u[j + 1];
    }
  }
  Column first = load_column(block);
#pragma GCC unroll 12
  for (int64_t k = 0; k < kWides; ++k) {
    sum.part[k] += other.part[k];
    first.part[k] -= u[0] * sum.part[k];
  }
  store_column(block, first);
  const double beta = head_reflector(block, next);
  const Column v = load_column(next);
  const double turned = product_of(sum, v);
  for (int64_t j = 0; j < kBand; j += kWide) {
    Wide sums[kWide];
#pragma GCC unroll 12
    for (int64_t c = 0; c < kWide; ++c) {
      sums[c] = Wide{};
      const Column x = load_column(block + (j + c) * kBandStep);
#pragma GCC unroll 12
      for (int64_t k = 0; k < kWides; ++k)
        sums[c] += x.part[k] * v.part[k];
    }
    Wide factors, products;
    load(factors, u + j);
    sum_each(sums, products);
    alignas(64) double along[kWide];
    store(along, products - factors * turned);
#pragma GCC unroll 12
    for (int64_t c = 0; c < kWide; ++c) {
      double* column = block + (j + c) * kBandStep;
      Column x = load_column(column);
#pragma GCC unroll 12
      for (int64_t k = 0; k < kWides; ++k)
        x.part[k] -= u[j + c] * sum.part[k] + along[c] * v.part[k];
      store_column(column, x);
    }
  }
  store_column(block, Column{});
  block[0] = beta;
}

// The lower triangle of B, in m.g -> d, e. Reflectors take its place: row s has those of sweep s, at
// columns s + 1, s + 1 + kBand, ... The last one may reach into the next row, where it is zero and
// is written before that row is.
inline void chase(const Reduction& m) {
  const int64_t t = m.t, ld = m.ld;
  std::vector<double> memory((t + kBand + 1) * kBandColumn + 8);
  double* band = memory.data() + 8;  // before it what lies above the diagonal of the first column
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = std::max<int64_t>(0, i - kBand); j <= i; ++j)
      band[j * kBandColumn + i - j] = m.g[i * ld + j];
  for (int64_t s = 0; s < t; ++s) {
    double *column = band + s * kBandColumn, *u = m.g + s * ld + s + 1;
    m.d[s] = column[0];
    if (s + 1 == t)
      break;
    m.e[s] = head_reflector(column + 1, u);
    for (int64_t row = s + 1; row < t; row += kBand, u += kBand) {
      double* block = band + row * kBandColumn;
      // The next reflector first: nothing waits for the block on the diagonal.
      if (row + kBand < t)
        turn_below(block + kBand, u, u + kBand);
      turn_both_sides(block, u);
    }
  }
}

// x <- Q2 x or Q2^T x.
inline void apply_chase(const Reduction& m, bool transposed, double* x) {
  const int64_t t = m.t;
  std::vector<double> memory(m.ld + kBand);
  double* y = memory.data();
  std::memcpy(y, x, sizeof(double) * t);
  for (int64_t step = 0; step + 1 < t; ++step) {
    const int64_t s = transposed ? step : t - 2 - step;
    for (int64_t row = s + 1; row < t; row += kBand)
      reflect(m.g + s * m.ld + row, 1.0, kBand, y + row);
    std::fill(y + t, y + t + kBand, 0.0);  // by what begins the next row of g
  }
  std::memcpy(x, y, sizeof(double) * t);
}

// Reflectors of the first stage, or of the only one; x has ld entries, those beyond t zero.
inline void apply_first_stage(const Reduction& m, bool transposed, double* x) {
  const int64_t beside = m.two_stages ? kBand : 1;
  for (int64_t step = beside; step < m.t; ++step) {
    const int64_t i = transposed ? m.t - 1 + beside - step : step;
    if (m.tau[i] != 0.0)
      reflect(m.v + i * m.ld, m.tau[i], (i - beside + 4) / 4 * 4, x);
  }
}

// x <- Q x or Q^T x.
inline void apply_q(const Reduction& m, bool transposed, double* x) {
  if (m.two_stages && !transposed)
    apply_chase(m, transposed, x);
  apply_first_stage(m, transposed, x);
  if (m.two_stages && transposed)
    apply_chase(m, transposed, x);
}

// G = Q T Q^T.
template <typename Run>
void reduce(const Reduction& m, const Run& run) {
  if (!m.two_stages)
    return reduce_by_blocks(m, run);
  reduce_to_band(m, run);
  chase(m);
}
