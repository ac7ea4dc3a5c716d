// What one thread block does to one matrix in float64: Gram matrix, Jacobi diagonalisation, product
// with an orthogonal matrix, reductions. spectrum.cuh (small sides) and spectrum_large.cuh (large
// ones) are made of these.
//
// Symbols: M (m x t, m >= t) is the matrix or its transpose, whichever is tall, divided by a power
// of two that brings its largest entry to [1/2, 1). t is padded to the even number `side` with zero
// columns, which no rotation touches. Symmetric matrices are stored as packed lower triangles.
#pragma once

#include <cfloat>
#include <cstdint>

#include "../extremes.h"
#include "portable.cuh"

namespace immunize_ext::spectrum {

using simt::GlobalPtr;
using simt::SharedPtr;
using simt::Stream;

constexpr double kEps = 2.220446049250313e-16;
constexpr unsigned kFullMask = 0xFFFFFFFF;
constexpr int kWarp = 32;
constexpr int kRegisters = 4;  // a thread holds blocks of 4 x 4 products

__host__ __device__ constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
__host__ __device__ constexpr std::int64_t ceil_div64(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
__host__ __device__ constexpr int packed_size(int side) {
  return side * (side + 1) / 2;
}
// Position of element (i, j) or (j, i) of a symmetric matrix.
__host__ __device__ constexpr int packed_index(int i, int j) {
  return i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i;
}
__host__ __device__ constexpr int larger(int a, int b) {
  return a > b ? a : b;
}
__host__ __device__ constexpr int smaller(int a, int b) {
  return a < b ? a : b;
}

// Row of item k when the items of a lower triangle are counted row by row.
__device__ __forceinline__ int triangle_row(int k) {
  int row = static_cast<int>((sqrtf(8.0F * static_cast<float>(k) + 1.0F) - 1.0F) * 0.5F);
  while ((row + 1) * (row + 2) / 2 <= k) {
    ++row;
  }
  while (row * (row + 1) / 2 > k) {
    --row;
  }
  return row;
}

// A matrix as it comes, read as float64 times a power of two. The power is split in two factors,
// since 2^1074, which brings a denormal to 1, is itself no number.
template <typename T>
struct InputRows {
  SharedPtr<const T> data;
  std::int64_t row_step;
  std::int64_t column_step;
  int columns;
  double factor;
  double second_factor;

  __device__ __forceinline__ bool is_contiguous() const {
    return column_step == 1;
  }
  __device__ __forceinline__ double at(std::int64_t row, int column) const {
    const T value = data[row * row_step + column * column_step];
    return static_cast<double>(value) * factor * second_factor;
  }
};

// Columns of a row-major workspace: `split` of them from `first`, the others from `second`.
struct WorkRows {
  SharedPtr<double> data;
  std::int64_t row_step;
  int columns;
  int split;
  std::int64_t first;
  std::int64_t second;

  __device__ __forceinline__ bool is_contiguous() const {
    return true;
  }
  __device__ __forceinline__ std::int64_t index(std::int64_t row, int column) const {
    return row * row_step + (column < split ? first + column : second + (column - split));
  }
  __device__ __forceinline__ double at(std::int64_t row, int column) const {
    return data[index(row, column)];
  }
};

__device__ __forceinline__ WorkRows all_columns(SharedPtr<double> data, int side) {
  return WorkRows{data, side, side, side, 0, 0};
}

// M = a / 2^exponent for a matrix a (n x p) as it lies in memory; `transposed` where n <= p.
template <typename T>
__device__ __forceinline__ InputRows<T> tall_rows(
    SharedPtr<const T> a, std::int64_t m, int t, bool transposed, int exponent) {
  const int half = exponent / 2;
  return InputRows<T>{
      a,
      transposed ? 1 : std::int64_t{t},
      transposed ? m : 1,
      t,
      ldexp(1.0, -half),
      ldexp(1.0, half - exponent)};
}

// --- Reductions: the same order of additions whatever the schedule --------------------------------

__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

// The sum over the block, for every thread; blockDim.x is a multiple of 32. scratch: 32 doubles.
__device__ __forceinline__ double block_sum(double value, SharedPtr<double> scratch) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  double total = 0.0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    const double part = scratch[w];
    total += part;
  }
  return total;
}

// The largest |entry| over the block as its bits, which are ordered like the numbers, with infinity
// and then NaN at the end.
using Bits = unsigned long long;
constexpr Bits kInfinityBits = 0x7FF0000000000000ULL;

__device__ __forceinline__ Bits magnitude_bits(double value) {
  return static_cast<Bits>(__double_as_longlong(fabs(value)));
}

__device__ __forceinline__ Bits block_max(Bits value, SharedPtr<double> scratch) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Bits other = __shfl_xor_sync(kFullMask, value, offset);
    value = other > value ? other : value;
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = __longlong_as_double(static_cast<long long>(value));
  }
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    const double part = scratch[w];
    const Bits other = static_cast<Bits>(__double_as_longlong(part));
    value = other > value ? other : value;
  }
  return value;
}

// e with |largest| in [2^e, 2^(e + 1)), so that 2^e is finite; 0 for a zero or non-finite matrix.
__device__ __forceinline__ int scale_exponent(Bits largest) {
  if (largest == 0 || largest >= kInfinityBits) {
    return 0;
  }
  return ilogb(__longlong_as_double(static_cast<long long>(largest)));
}

// --- Tiles ---------------------------------------------------------------------------------------

// tile (count x width, rows `width + 1` apart) = rows first ... first + count, zero-padded columns.
// Neighbouring threads read neighbouring addresses; the odd distance spreads them over the banks.
template <typename Rows>
__device__ __forceinline__ void load_tile(
    SharedPtr<double> tile, int width, const Rows& rows, std::int64_t first, int count) {
  constexpr int kLoads = 4;  // under way at a time
  const int threads = static_cast<int>(blockDim.x);
  for (int base = static_cast<int>(threadIdx.x); base < count * width; base += kLoads * threads) {
    double value[kLoads];
    int place[kLoads];
    IMMUNIZE_EXT_UNROLL
    for (int c = 0; c < kLoads; ++c) {
      const int e = smaller(base + c * threads, count * width - 1);
      const int outer = e / (rows.is_contiguous() ? width : count);
      const int inner = e - outer * (rows.is_contiguous() ? width : count);
      const int row = rows.is_contiguous() ? outer : inner;
      const int column = rows.is_contiguous() ? inner : outer;
      place[c] = row * (width + 1) + column;
      value[c] = column < rows.columns ? rows.at(first + row, column) : 0.0;
    }
    IMMUNIZE_EXT_UNROLL
    for (int c = 0; c < kLoads; ++c) {
      if (base + c * threads < count * width) {
        tile[place[c]] = value[c];
      }
    }
  }
}

// How accumulate_gram cuts its work: `groups` partial sums over interleaved rows, so that few
// columns still occupy all threads.
struct GramShape {
  int side;       // even
  int quarter;    // ceil(side / 4): a thread multiplies columns c, c + quarter, c + 2 quarter, ...
  int tile_rows;  // rows in shared memory at a time
  int groups;

  __host__ __device__ int tile_width() const {
    return kRegisters * quarter;
  }
  __host__ __device__ int tile_doubles() const {
    return tile_rows * (tile_width() + 1);
  }
  __host__ __device__ int gram_doubles() const {
    return groups * packed_size(side);
  }
};

// gram (packed) = sum over rows [begin, end) of row^T row.
template <typename Rows>
__device__ __forceinline__ void accumulate_gram(
    const GramShape& shape,
    const Rows& rows,
    std::int64_t begin,
    std::int64_t end,
    SharedPtr<double> tile,
    SharedPtr<double> gram) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int packed = packed_size(shape.side);
  const int width = shape.tile_width();
  const int blocks = packed_size(shape.quarter);
  __syncthreads();
  for (int e = thread; e < shape.groups * packed; e += threads) {
    gram[e] = 0.0;
  }
  for (std::int64_t first = begin; first < end; first += shape.tile_rows) {
    const int count =
        end - first < shape.tile_rows ? static_cast<int>(end - first) : shape.tile_rows;
    load_tile(tile, width, rows, first, count);
    __syncthreads();
    for (int item = thread; item < shape.groups * blocks; item += threads) {
      const int group = item / blocks;
      const int block_row = triangle_row(item - group * blocks);
      const int block_column = item - group * blocks - packed_size(block_row);
      double sum[kRegisters][kRegisters] = {};
      for (int r = group; r < count; r += shape.groups) {
        double left[kRegisters];
        double right[kRegisters];
        for (int c = 0; c < kRegisters; ++c) {
          left[c] = tile[r * (width + 1) + block_row + c * shape.quarter];
          right[c] = tile[r * (width + 1) + block_column + c * shape.quarter];
        }
        for (int c = 0; c < kRegisters; ++c) {
          for (int d = 0; d < kRegisters; ++d) {
            sum[c][d] = fma(left[c], right[d], sum[c][d]);
          }
        }
      }
      // A diagonal block holds each off-diagonal product twice.
      for (int c = 0; c < kRegisters; ++c) {
        for (int d = 0; d < kRegisters; ++d) {
          const int i = block_row + c * shape.quarter;
          const int j = block_column + d * shape.quarter;
          if (i < shape.side && j < shape.side && (block_row != block_column || c >= d)) {
            gram[group * packed + packed_index(i, j)] += sum[c][d];
          }
        }
      }
    }
    __syncthreads();
  }
  if (shape.groups > 1) {
    for (int e = thread; e < packed; e += threads) {
      double total = gram[e];
      for (int g = 1; g < shape.groups; ++g) {
        const double part = gram[g * packed + e];
        total += part;
      }
      gram[e] = total;
    }
  }
  __syncthreads();
}

// target = rows [begin, end) of `rows` times v (side x side, row-major). target may be where `rows`
// lie: a tile is read before it is written.
template <typename Rows>
__device__ __forceinline__ void multiply_rows(
    const Rows& rows,
    std::int64_t begin,
    std::int64_t end,
    SharedPtr<const double> v,
    int side,
    SharedPtr<double> tile,
    int tile_rows,
    const WorkRows& target) {
  const int quarter = ceil_div(side, kRegisters);
  const int stride = side + 1;
  for (std::int64_t first = begin; first < end; first += tile_rows) {
    const int count = end - first < tile_rows ? static_cast<int>(end - first) : tile_rows;
    const int row_blocks = ceil_div(count, kRegisters);
    __syncthreads();
    load_tile(tile, side, rows, first, count);
    __syncthreads();
    for (int item = static_cast<int>(threadIdx.x); item < row_blocks * quarter;
         item += static_cast<int>(blockDim.x)) {
      const int row = item / quarter;
      const int column = item - row * quarter;
      int row_at[kRegisters];
      int column_at[kRegisters];
      for (int c = 0; c < kRegisters; ++c) {
        // What lies outside is computed from the last row or column, and not stored.
        row_at[c] = smaller(row + c * row_blocks, count - 1);
        column_at[c] = smaller(column + c * quarter, side - 1);
      }
      double sum[kRegisters][kRegisters] = {};
      for (int k = 0; k < side; ++k) {
        double left[kRegisters];
        double right[kRegisters];
        for (int c = 0; c < kRegisters; ++c) {
          left[c] = tile[row_at[c] * stride + k];
          right[c] = v[k * side + column_at[c]];
        }
        for (int c = 0; c < kRegisters; ++c) {
          for (int d = 0; d < kRegisters; ++d) {
            sum[c][d] = fma(left[c], right[d], sum[c][d]);
          }
        }
      }
      for (int c = 0; c < kRegisters; ++c) {
        for (int d = 0; d < kRegisters; ++d) {
          if (row + c * row_blocks < count && column + d * quarter < side) {
            target.data[target.index(first + row_at[c], column_at[d])] = sum[c][d];
          }
        }
      }
    }
  }
  __syncthreads();
}

// --- Jacobi --------------------------------------------------------------------------------------

// Pair number k of a round: every index once a round, every pair once in side - 1 rounds (a
// tournament by the circle method: the last index stays, the others move on).
struct Pair {
  int p, q;  // p < q
};
__device__ __forceinline__ Pair tournament_pair(int k, int round, int side) {
  const int others = side - 1;
  int a = others;
  int b = round;
  if (k > 0) {
    a = round + k;
    a -= a >= others ? others : 0;
    b = round - k;
    b += b < 0 ? others : 0;
  }
  return a < b ? Pair{a, b} : Pair{b, a};
}

// (x, y) <- (c x - s y, s x + c y). Written with s and r = s / (1 + c), so that c x = x - s r x:
// for a small angle c would be rounded to 1, the rotation would stretch by 1 + s^2 / 2, and
// thousands of them, all to the same side, would add up.
//
// `exchanges`: x and y then change places. The larger of two columns goes to the smaller index
// (de Rijk): on spectra over many decades that halves the number of sweeps.
struct Rotation {
  double sine, ratio;
  bool exchanges;

  // rotation: three rows of `half` numbers.
  __device__ __forceinline__ Rotation(SharedPtr<const double> rotation, int k, int half)
      : sine(rotation[k]), ratio(rotation[half + k]) {
    const double flag = rotation[2 * half + k];
    exchanges = flag != 0.0;
  }
  __device__ __forceinline__ bool is_identity() const {
    return sine == 0.0 && !exchanges;
  }
  __device__ __forceinline__ void apply(double& x, double& y) const {
    const double one = fma(-sine, fma(ratio, x, y), x);
    const double other = fma(sine, fma(-ratio, y, x), y);
    x = exchanges ? other : one;
    y = exchanges ? one : other;
  }
};

// Two-sided Jacobi with the tournament ordering: gram (packed, side x side) becomes diagonal in
// place, v is the product of the rotations. Stops after a sweep without a rotation. Returns, to all
// threads, whether there was any. rotation: 3 side / 2 doubles.
//
// (i, j) is rotated while |g_ij| > tolerance sqrt(g_ii g_jj), a test relative to both columns: for
// a Gram matrix D H D of columns of very different norms D this finds small eigenvalues, and the
// small entries of v, to a relative accuracy of eps cond(H) where a test relative to the largest
// entry would stop at eps |D|^2 (Demmel and Veselic, "Jacobi's method is more accurate than QR",
// SIAM J. Matrix Anal. Appl. 13, 1992). `floor` replaces diagonal entries that are noise.
__device__ __forceinline__ bool diagonalise(
    SharedPtr<double> gram,
    SharedPtr<double> v,
    SharedPtr<double> rotation,
    int side,
    double tolerance,
    double floor,
    int max_sweeps) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int half = side / 2;
  for (int e = thread; e < side * side; e += threads) {
    v[e] = e / side == e % side ? 1.0 : 0.0;
  }
  __syncthreads();
  bool any = false;
  for (int sweep = 0; sweep < max_sweeps; ++sweep) {
    bool rotated = false;  // by this thread
    for (int round = 0; round < side - 1; ++round) {
      bool moves = false;
      for (int k = thread; k < half; k += threads) {
        const Pair pair = tournament_pair(k, round, side);
        double pp = gram[packed_index(pair.p, pair.p)];
        double qq = gram[packed_index(pair.q, pair.q)];
        const double pq = gram[packed_index(pair.q, pair.p)];
        double sine = 0.0;
        double ratio = 0.0;
        if (fabs(pq) > tolerance * sqrt(fmax(pp, floor)) * sqrt(fmax(qq, floor))) {
          // Annihilates pq by the smaller of the two possible angles.
          const double tau = (qq - pp) / (2.0 * pq);
          const double tangent = copysign(1.0 / (fabs(tau) + sqrt(fma(tau, tau, 1.0))), tau);
          const double cosine = 1.0 / sqrt(fma(tangent, tangent, 1.0));
          sine = tangent * cosine;
          ratio = sine / (1.0 + cosine);
          pp = fma(-tangent, pq, pp);
          qq = fma(tangent, pq, qq);
          gram[packed_index(pair.q, pair.p)] = 0.0;
          rotated = true;
        }
        // Not pp < qq: a pp of -1e-17, which is noise, must not bring a column of padding forward.
        const bool exchanges = fmax(pp, 0.0) < qq;
        if (sine != 0.0 || exchanges) {
          gram[packed_index(pair.p, pair.p)] = exchanges ? qq : pp;
          gram[packed_index(pair.q, pair.q)] = exchanges ? pp : qq;
          moves = true;
        }
        rotation[k] = sine;
        rotation[half + k] = ratio;
        rotation[2 * half + k] = exchanges ? 1.0 : 0.0;
      }
      if (__syncthreads_or(moves ? 1 : 0) == 0) {
        continue;
      }
      // gram = J^T gram J: the 2 x 2 block of two different pairs belongs to one thread.
      for (int item = thread; item < half * (half - 1) / 2; item += threads) {
        const int above = triangle_row(item);
        const int first = above + 1;
        const int second = item - packed_size(above);
        const Rotation left(rotation, first, half);
        const Rotation right(rotation, second, half);
        if (left.is_identity() && right.is_identity()) {
          continue;
        }
        const Pair one = tournament_pair(first, round, side);
        const Pair two = tournament_pair(second, round, side);
        const SharedPtr<double> pp = gram + packed_index(one.p, two.p);
        const SharedPtr<double> pq = gram + packed_index(one.p, two.q);
        const SharedPtr<double> qp = gram + packed_index(one.q, two.p);
        const SharedPtr<double> qq = gram + packed_index(one.q, two.q);
        double a = pp[0];
        double b = pq[0];
        double c = qp[0];
        double d = qq[0];
        left.apply(a, c);
        left.apply(b, d);
        right.apply(a, b);
        right.apply(c, d);
        pp[0] = a;
        pq[0] = b;
        qp[0] = c;
        qq[0] = d;
      }
      // v = v J.
      for (int item = thread; item < side * half; item += threads) {
        const int row = item / half;
        const int k = item - row * half;
        const Rotation turn(rotation, k, half);
        if (turn.is_identity()) {
          continue;
        }
        const Pair pair = tournament_pair(k, round, side);
        double x = v[row * side + pair.p];
        double y = v[row * side + pair.q];
        turn.apply(x, y);
        v[row * side + pair.p] = x;
        v[row * side + pair.q] = y;
      }
      __syncthreads();
    }
    if (__syncthreads_or(rotated ? 1 : 0) == 0) {
      break;
    }
    any = true;
  }
  return any;
}

// --- Which singular values count, and which belong to an extreme ---------------------------------

// For singular values in any order. An extreme without index has value and gradient 0.
struct ClusterBounds {
  double largest, smallest;
  double near;  // values within this of an extreme belong to it
  double cut;   // values above this count
  int largest_index, smallest_index;
  std::int64_t rank, multiplicity_max, multiplicity_min;

  __device__ __forceinline__ bool in_max(double sigma) const {
    return largest_index >= 0 && sigma > cut && largest - sigma <= near;
  }
  __device__ __forceinline__ bool in_min(double sigma) const {
    return smallest_index >= 0 && sigma > cut && sigma - smallest <= near;
  }
};

__device__ __forceinline__ ClusterBounds
find_extremes(SharedPtr<const double> sigma, int t, const Policy& policy) {
  ClusterBounds found{0.0, 0.0, 0.0, 0.0, -1, -1, 0, policy.full_side, policy.full_side};
  for (int i = 0; i < t; ++i) {
    const double value = sigma[i];
    if (value > found.largest) {
      found.largest = value;
      found.largest_index = i;
    }
  }
  if (found.largest_index < 0) {
    return found;  // the zero matrix
  }
  found.cut = policy.rank_rtol * found.largest;
  found.near = policy.cluster_rtol * found.largest;
  double last = found.largest;
  int last_index = found.largest_index;
  for (int i = 0; i < t; ++i) {
    const double value = sigma[i];
    if (value > found.cut) {
      ++found.rank;
      if (value < last) {
        last = value;
        last_index = i;
      }
    }
  }
  if (!policy.full_rank || found.rank >= policy.full_side) {
    found.smallest = last;
    found.smallest_index = last_index;
  }
  found.multiplicity_max = 0;
  std::int64_t at_minimum = 0;
  for (int i = 0; i < t; ++i) {
    const double value = sigma[i];
    found.multiplicity_max += found.in_max(value) ? 1 : 0;
    at_minimum += found.in_min(value) ? 1 : 0;
  }
  found.multiplicity_min = found.smallest_index >= 0 ? at_minimum : policy.full_side - found.rank;
  return found;
}

}  // namespace immunize_ext::spectrum
