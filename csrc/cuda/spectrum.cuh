// Extremal singular values and their gradient for matrices with a small thin side: one thread block
// decomposes one matrix. What has a thin side beyond the shared memory of a block goes to
// spectrum_large.cuh.
//
// Method: one-sided Jacobi (Hestenes) with a single block of columns. One iteration is
//     G = B^T B (float64),  G = V diag(lambda) V^T by two-sided Jacobi in shared memory,  B <- B V,
// from B = M until the columns of B are orthogonal enough; then sigma_i = |b_i|, u_i = b_i/sigma_i,
// and v_i is column i of the product of all V.
//
// Why this is as accurate as a bidiagonal SVD although it forms Gram matrices. The product B V is
// computed with an error of c eps |M|, so B is exactly (M + E) V: backward stable, at every
// iteration. What remains is the error of the Gram matrix, |dG_jk| <= c eps d_j d_k with
// d_j = |b_j|, which changes lambda_i by at most
//     c eps (sum_j |V_ji| d_j)^2 ~ c eps s_i,  s_i = sum_j V_ji^2 d_j^2
// (rounding errors add up as a root mean square), so sigma_i by c eps s_i / (2 sigma_i), or by
// sqrt(c eps s_i) at sigma_i = 0.
// Both are a small multiple of eps sigma_max iff
//     s_i <= kSpread sigma_max max(sigma_i, eps sigma_max),                                    (*)
// which the block tests for every i. Well-conditioned matrices pass at once: no product with V, M
// is read twice. Otherwise the next G belongs to columns of norm d_j <~ sqrt(eps) sigma_max in the
// directions of small sigma, s_i has fallen to eps sigma_max^2 and (*) holds: two iterations at any
// condition number, a third if c is large. The diagonalisation must not lose what the grading of G
// gives, see diagonalise().
//
// It also gives u_min to eps sigma_max / gap, as a bidiagonal SVD does: M v_min / sigma_min would
// carry the error eps kappa of the product, while here the columns of B are orthogonal.
//
// That decomposes M, of which two triplets are asked for. So another kernel comes first, small_ends,
// which finds those through the tridiagonal form of G and proves or refuses them
// (spectrum_tridiagonal.cuh); Jacobi takes what was refused, marked by a rank of -1.
//
// No decision is taken on the host, and nothing depends on the schedule.
#pragma once

#include "spectrum_tridiagonal.cuh"

namespace immunize_ext::spectrum {

constexpr double kSpread = 8.0;
constexpr int kMaxIterations = 4;
constexpr int kMaxSweeps = 80;  // 10 to 30 are needed
// In (2^-60 sigma_max)^2: below it a column is zero for every tolerance that float64 can resolve.
constexpr double kZeroColumn = 7.5231638452626401e-37;  // 2^-120
constexpr int kMaxThreads = 512;

// How one block works on matrices of one shape.
struct SmallPlan {
  std::int64_t m;
  int t;
  bool transposed;  // M is the transpose of the matrix
  GramShape gram;
  int multiply_rows;
  int gram_region, v_region;  // doubles of shared memory
  unsigned threads;

  __host__ __device__ int side() const {
    return gram.side;
  }
  __host__ __device__ std::int64_t work_doubles() const {
    return (m + gram.side) * gram.side;
  }
  __host__ __device__ std::size_t shared_bytes() const {
    const int vectors = 4 * gram.side + kWarp;
    return sizeof(double) * static_cast<std::size_t>(gram_region + v_region + vectors);
  }
};

// Threads and tiles for sides and rows of M.
inline void set_shape(SmallPlan& plan, unsigned threads, int tile_rows) {
  const int t = plan.t;
  const int rows = plan.m < 512 ? static_cast<int>(plan.m) : 512;
  plan.threads = rows == 512 && threads < 128 ? 128 : threads;
  plan.gram.side = 2 * ceil_div(t, 2);
  plan.gram.quarter = ceil_div(plan.gram.side, kRegisters);
  plan.gram.tile_rows = smaller(rows, tile_rows);
  const int blocks = packed_size(plan.gram.quarter);
  const int most_groups = t <= 4 ? 32 : 8;
  plan.gram.groups = larger(
      1,
      smaller(smaller(static_cast<int>(plan.threads) / blocks, most_groups), plan.gram.tile_rows));
  plan.v_region = larger(plan.gram.side * plan.gram.side, plan.gram.tile_doubles());
  const int stride = plan.gram.side + 1;
  plan.gram_region = larger(plan.gram.gram_doubles(), smaller(rows, 16) * stride);
  plan.multiply_rows = smaller(rows, plan.gram_region / stride);
}

// For a matrix n x p.
inline SmallPlan small_plan(std::int64_t n, std::int64_t p) {
  SmallPlan plan{};
  plan.transposed = n <= p;  // M^T M is then the Gram matrix x x^T that the gradient expects
  plan.m = plan.transposed ? p : n;
  plan.t = static_cast<int>(plan.transposed ? n : p);
  const int t = plan.t;
  const unsigned threads = t <= 4 ? 32 : t <= 16 ? 64 : t <= 32 ? 128 : t <= 64 ? 256 : kMaxThreads;
  set_shape(plan, threads, t <= 8 ? 256 : t <= 32 ? 64 : 32);
  return plan;
}

// --- The two ends alone ---------------------------------------------------------------------------

constexpr int kMostParts = 32;
constexpr int kPartRows = 64;  // a multiple of them is a part

// How small_ends works on matrices of one shape. What is long is cut into parts, and a block of
// ends_gram takes the Gram matrix of each: one block alone would wait for memory and for its own
// sums most of the time. The cut follows from the shape, for a matrix to give the same bits
// whatever it comes with.
struct EndsPlan {
  SmallPlan block;      // of small_ends
  SmallPlan part;       // of ends_gram
  int parts;            // 0: small_ends multiplies itself
  std::int64_t height;  // rows of a part

  int t() const {
    return block.t;
  }
  // Of workspace for a matrix: the largest magnitude of each part and its Gram matrix.
  __host__ __device__ std::int64_t part_doubles() const {
    return 1 + packed_size(block.side());
  }
  std::int64_t work_doubles() const {
    return parts * part_doubles();
  }
};

inline EndsPlan ends_plan(std::int64_t n, std::int64_t p) {
  EndsPlan plan{};
  SmallPlan& block = plan.block;
  block = small_plan(n, p);
  const int t = block.t;
  plan.part = block;
  if (block.m > kPartRows) {
    const std::int64_t tiles = ceil_div64(block.m, kPartRows);
    plan.height = ceil_div64(tiles, kMostParts) * kPartRows;
    plan.parts = static_cast<int>(ceil_div64(block.m, plan.height));
    set_shape(plan.part, t <= 16 ? 64 : t <= 32 ? 128 : 256, kPartRows);
    plan.part.v_region = plan.part.gram.tile_doubles();
    plan.part.gram_region = plan.part.gram.gram_doubles();
  }
  const bool alone = plan.parts == 0;
  block.threads = ends_threads(t);
  block.gram.tile_rows = smaller(static_cast<int>(alone ? block.m : 1), kPartRows);
  block.gram.groups =
      larger(1, smaller(static_cast<int>(block.threads) / packed_size(block.gram.quarter), 8));
  block.gram.groups = smaller(block.gram.groups, block.gram.tile_rows);
  block.gram_region = block.gram.gram_doubles();
  block.v_region = larger(block.gram.tile_doubles(), tridiagonal_doubles(t, block.threads));
  return plan;
}

inline bool ends_fit(const EndsPlan& plan, Stream stream) {
  const std::size_t limit = simt::shared_limit(stream);
  return plan.t() <= kMostEnds && plan.block.shared_bytes() <= limit &&
         plan.part.shared_bytes() <= limit;
}

// Matrices that the parts take at a time, so that their workspace stays below 1 GiB.
inline std::int64_t ends_step(const EndsPlan& plan, std::int64_t batch) {
  constexpr std::int64_t kWorkspaceDoubles = std::int64_t{1} << 27;
  const std::int64_t affordable = plan.parts == 0 ? batch : kWorkspaceDoubles / plan.work_doubles();
  return affordable < batch ? affordable : batch;
}

// The device can run the small route: its blocks have enough shared memory.
inline bool is_small(std::int64_t n, std::int64_t p, Stream stream) {
  constexpr std::int64_t kIndexLimit = 4096;  // the plan is computed in int
  return (n < kIndexLimit || p < kIndexLimit) &&
         small_plan(n < kIndexLimit ? n : kIndexLimit, p < kIndexLimit ? p : kIndexLimit)
                 .shared_bytes() <= simt::shared_limit(stream);
}

// Blocks to launch: each works on every grid-th matrix and owns work_doubles() of workspace.
inline unsigned small_grid(const SmallPlan& plan, std::int64_t batch, Stream stream) {
  constexpr std::int64_t kWorkspaceBytes = std::int64_t{1} << 29;
  const std::int64_t processors = simt::multiprocessor_count(stream);
  const std::int64_t by_shared =
      static_cast<std::int64_t>(simt::shared_limit(stream) / plan.shared_bytes());
  const std::int64_t by_threads = 2048 / plan.threads;
  std::int64_t resident = by_shared < by_threads ? by_shared : by_threads;
  resident = resident < 1 ? 1 : resident > 32 ? 32 : resident;
  const std::int64_t slot = plan.work_doubles() * static_cast<std::int64_t>(sizeof(double));
  std::int64_t blocks = resident * processors;
  const std::int64_t affordable = kWorkspaceBytes / slot;
  if (blocks > affordable) {
    blocks = affordable > processors ? affordable : processors;
  }
  return static_cast<unsigned>(blocks < batch ? blocks : batch);
}

// Results, all contiguous. M = sum sigma_i long_i short_i^T: where M is the transpose of the
// matrix, long_i is its right singular vector.
struct Outputs {
  SharedPtr<double> value_max, value_min;                            // [batch]
  SharedPtr<std::int64_t> rank, multiplicity_max, multiplicity_min;  // [batch]
  SharedPtr<double> long_max, short_max, long_min, short_min;        // [batch, m or t]
  SharedPtr<double> squared_frobenius;                               // [batch], of_gram
  SharedPtr<double> thin_gram;                                       // [batch, t, t], of_gram
  bool of_gram;                                                      // values are lambda = sigma^2
};

// The shared memory of a block. `gram` is free while B V is computed, `v` while G is.
struct SmallSpace {
  SharedPtr<double> gram, v, rotation, norms, sigma, scratch;

  __device__ __forceinline__ SmallSpace(SharedPtr<double> shared, const SmallPlan& plan)
      : gram(shared),
        v(gram + plan.gram_region),
        rotation(v + plan.v_region),
        norms(rotation + 2 * plan.side()),
        sigma(norms + plan.side()),
        scratch(sigma + plan.side()) {}
};

__device__ __forceinline__ TridiagonalSpace
tridiagonal_space(const SmallPlan& plan, const SmallSpace& space) {
  const int t = plan.t;
  const int stride = tridiagonal_stride(t);
  const SharedPtr<double> pivots = space.v + t * stride;
  return TridiagonalSpace{
      t,
      stride,
      space.v,
      space.rotation,
      space.rotation + plan.side(),
      space.sigma,
      space.norms,
      pivots,
      pivots + 4 * t,
      pivots + 6 * t,
      pivots + 8 * t,
      pivots + 10 * t,
      space.scratch};
}

template <typename T>
__device__ __forceinline__ Bits
largest_magnitude(SharedPtr<const T> a, std::int64_t count, SharedPtr<double> scratch) {
  Bits largest = 0;
  for (std::int64_t e = threadIdx.x; e < count; e += blockDim.x) {
    const T value = a[e];
    const Bits bits = magnitude_bits(static_cast<double>(value));
    largest = bits > largest ? bits : largest;
  }
  return block_max(largest, scratch);
}

// thin_gram = scale^2 G in full, and its squared Frobenius norm.
__device__ __forceinline__ void write_gram(
    const Outputs& out,
    const SmallPlan& plan,
    const SmallSpace& space,
    std::int64_t b,
    double scale) {
  const int t = plan.t;
  const SharedPtr<double> thin = out.thin_gram + b * t * t;
  double squares = 0.0;
  for (int e = static_cast<int>(threadIdx.x); e < t * t; e += static_cast<int>(blockDim.x)) {
    const double value = space.gram[packed_index(e / t, e % t)];
    squares = fma(value, value, squares);
    thin[e] = value * scale * scale;
  }
  squares = block_sum(squares, space.scratch);
  if (threadIdx.x == 0) {
    out.squared_frobenius[b] = squares * scale * scale * scale * scale;
  }
}

// The method above, from G of M in space.gram. Leaves sigma (scaled) and the last V in shared memory;
// returns how often B was multiplied: 0 means that V belongs to M, otherwise it belongs to B = rows
// [0, m) of work, and the product of the earlier V is rows [m, m + side). With multiply_last, B is
// multiplied by the last V as well, and has orthogonal columns.
template <bool multiply_last, typename T>
__device__ __forceinline__ int decompose_small(
    const InputRows<T>& matrix,
    const SmallPlan& plan,
    const SmallSpace& space,
    SharedPtr<double> work) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int side = plan.side();
  for (int iteration = 0;; ++iteration) {
    if (iteration > 0) {
      accumulate_gram(plan.gram, all_columns(work, side), 0, plan.m, space.v, space.gram);
    }
    for (int i = thread; i < side; i += threads) {
      space.norms[i] = space.gram[packed_index(i, i)];
    }
    __syncthreads();
    // The first G carries noise of eps: no need to diagonalise it further.
    const double floor = iteration == 0 ? kEps / 16 : kZeroColumn;
    diagonalise(space.gram, space.v, space.rotation, side, kEps / 2, floor, kMaxSweeps);
    for (int i = thread; i < side; i += threads) {
      const double lambda = space.gram[packed_index(i, i)];
      space.sigma[i] = sqrt(fmax(lambda, 0.0));
    }
    __syncthreads();
    double top = 0.0;
    for (int i = 0; i < side; ++i) {
      const double value = space.sigma[i];
      top = fmax(top, value);
    }
    bool accurate = true;
    for (int i = thread; i < side; i += threads) {
      double spread = 0.0;
      for (int j = 0; j < side; ++j) {
        const double v = space.v[j * side + i];
        const double norm = space.norms[j];
        spread = fma(v * v, norm, spread);
      }
      const double value = space.sigma[i];
      accurate = accurate && spread <= kSpread * top * fmax(value, kEps * top);
    }
    const bool done = __syncthreads_and(accurate ? 1 : 0) != 0 || iteration + 1 == kMaxIterations;
    if (done && !multiply_last) {
      return iteration;
    }
    const WorkRows target = all_columns(work, side);
    if (iteration == 0) {
      multiply_rows(matrix, 0, plan.m, space.v, side, space.gram, plan.multiply_rows, target);
      for (int e = thread; e < side * side; e += threads) {
        work[plan.m * side + e] = space.v[e];
      }
    } else {
      multiply_rows(
          target, 0, plan.m + side, space.v, side, space.gram, plan.multiply_rows, target);
    }
    __syncthreads();
    if (done) {
      return iteration + 1;
    }
  }
}

// max_out[r] and min_out[r] = rows begin + r times columns `first` and `second` of v, scaled to
// unit norm; zero for a column of -1.
template <typename Rows>
__device__ __forceinline__ void unit_products(
    const Rows& rows,
    std::int64_t begin,
    std::int64_t count,
    SharedPtr<const double> v,
    int side,
    int first,
    int second,
    SharedPtr<double> max_out,
    SharedPtr<double> min_out,
    SharedPtr<double> scratch) {
  const int max_column = larger(first, 0);
  const int min_column = larger(second, 0);
  // A warp reads along what is contiguous: one row, or the same column of 32 rows.
  const bool by_warp = rows.is_contiguous();
  const int lanes = by_warp ? kWarp : 1;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const std::int64_t step = static_cast<int>(blockDim.x) / lanes;
  double max_squares = 0.0;
  double min_squares = 0.0;
  for (std::int64_t r = static_cast<int>(threadIdx.x) / lanes; r < count; r += step) {
    double x = 0.0;
    double y = 0.0;
    for (int j = lane; j < rows.columns; j += lanes) {
      const double value = rows.at(begin + r, j);
      const double to_max = v[j * side + max_column];
      const double to_min = v[j * side + min_column];
      x = fma(value, to_max, x);
      y = fma(value, to_min, y);
    }
    if (by_warp) {
      x = warp_sum(x);
      y = warp_sum(y);
    }
    if (lane == 0) {
      max_out[r] = x;
      min_out[r] = y;
      max_squares = fma(x, x, max_squares);
      min_squares = fma(y, y, min_squares);
    }
  }
  max_squares = block_sum(max_squares, scratch);
  min_squares = block_sum(min_squares, scratch);
  const double max_factor = first >= 0 && max_squares > 0.0 ? 1.0 / sqrt(max_squares) : 0.0;
  const double min_factor = second >= 0 && min_squares > 0.0 ? 1.0 / sqrt(min_squares) : 0.0;
  for (std::int64_t r = threadIdx.x; r < count; r += blockDim.x) {
    max_out[r] *= max_factor;
    min_out[r] *= min_factor;
  }
}

__device__ __forceinline__ void write_extremes(
    const Outputs& out, std::int64_t b, double largest, double smallest) {
  out.value_max[b] = out.of_gram ? largest * largest : largest;
  out.value_min[b] = out.of_gram ? smallest * smallest : smallest;
}

// What the operators return for matrix b, from the extremes of M.
__device__ __forceinline__ void write_values(
    const Outputs& out, std::int64_t b, const ClusterBounds& found, double scale) {
  write_extremes(out, b, found.largest * scale, found.smallest * scale);
  out.rank[b] = found.rank;
  out.multiplicity_max[b] = found.multiplicity_max;
  out.multiplicity_min[b] = found.multiplicity_min;
}

// A matrix with NaN or infinity: every output is defined, the first such matrix is remembered.
__device__ __forceinline__ void write_not_finite(
    const Outputs& out, std::int64_t b, std::int64_t m, int t, GlobalPtr<int> first_bad) {
  const double nan = __longlong_as_double(0x7FF8000000000000LL);
  for (std::int64_t e = threadIdx.x; e < m; e += blockDim.x) {
    out.long_max[b * m + e] = nan;
    out.long_min[b * m + e] = nan;
  }
  for (std::int64_t e = threadIdx.x; e < t; e += blockDim.x) {
    out.short_max[b * t + e] = nan;
    out.short_min[b * t + e] = nan;
  }
  if (out.of_gram) {
    for (std::int64_t e = threadIdx.x; e < std::int64_t{t} * t; e += blockDim.x) {
      out.thin_gram[b * t * t + e] = nan;
    }
  }
  if (threadIdx.x == 0) {
    write_values(out, b, ClusterBounds{nan, nan, nan, nan, -1, -1, 0, 0, 0}, 1.0);
    if (out.of_gram) {
      out.squared_frobenius[b] = nan;
    }
    atomicMin(&first_bad[0], static_cast<int>(b));
  }
}

// For each part of each matrix: the largest magnitude in it, and the Gram matrix of the part divided
// by the power of two below that.
template <typename T>
__global__ void __launch_bounds__(256) ends_gram(
    GlobalPtr<const T> a,  // [batch, n, p]
    EndsPlan plan,
    SharedPtr<double> work) {  // [batch, parts, part_doubles()]
  SIMT_DYNAMIC_SHARED(double, shared);
  const SmallPlan& part = plan.part;
  const SmallSpace space(shared, part);
  const std::int64_t m = part.m;
  const int t = part.t;
  const unsigned parts = static_cast<unsigned>(plan.parts);
  const std::int64_t b = blockIdx.x / parts;
  const std::int64_t begin = blockIdx.x % parts * plan.height;
  const std::int64_t end = begin + plan.height < m ? begin + plan.height : m;
  const std::int64_t count = end - begin;
  const SharedPtr<const T> matrix = a + b * m * t;
  const SharedPtr<double> out = work + blockIdx.x * plan.part_doubles();
  // Rows of M lie along memory, or each column of a part does.
  Bits largest = 0;
  if (part.transposed) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    for (int j = static_cast<int>(threadIdx.x) / kWarp; j < t; j += warps) {
      for (std::int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) {
        const T value = matrix[j * m + begin + i];
        const Bits bits = magnitude_bits(static_cast<double>(value));
        largest = bits > largest ? bits : largest;
      }
    }
    largest = block_max(largest, space.scratch);
  } else {
    largest = largest_magnitude<T>(matrix + begin * t, count * t, space.scratch);
  }
  if (threadIdx.x == 0) {
    out[0] = __longlong_as_double(static_cast<long long>(largest));
  }
  const InputRows<T> rows = tall_rows<T>(matrix, m, t, part.transposed, scale_exponent(largest));
  accumulate_gram(part.gram, rows, begin, end, space.v, space.gram);
  const int packed = packed_size(part.side());
  for (int e = static_cast<int>(threadIdx.x); e < packed; e += static_cast<int>(blockDim.x)) {
    const double value = space.gram[e];
    out[1 + e] = value;
  }
}

// The largest magnitude of a matrix, from those of its parts.
__device__ __forceinline__ Bits
largest_of_parts(const EndsPlan& plan, SharedPtr<const double> work, SharedPtr<double> scratch) {
  Bits largest = 0;
  if (static_cast<int>(threadIdx.x) < plan.parts) {
    const double magnitude = work[threadIdx.x * plan.part_doubles()];
    largest = magnitude_bits(magnitude);
  }
  return block_max(largest, scratch);
}

// G of M, which is divided by 2^exponent, from those of its parts. A power of two rounds nothing
// that matters beside the largest part.
__device__ __forceinline__ void add_parts(
    const EndsPlan& plan, SharedPtr<const double> work, int exponent, const SmallSpace& space) {
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t step = plan.part_doubles();
  __syncthreads();
  if (thread < plan.parts) {
    const double magnitude = work[thread * step];
    const Bits largest = magnitude_bits(magnitude);
    const int above = scale_exponent(largest) - exponent;
    space.scratch[thread] = largest == 0 ? 0.0 : ldexp(1.0, 2 * above);
  }
  __syncthreads();
  const int packed = packed_size(plan.block.side());
  for (int e = thread; e < packed; e += static_cast<int>(blockDim.x)) {
    double sum = 0.0;
    IMMUNIZE_EXT_UNROLL_BY(8)
    for (int part = 0; part < plan.parts; ++part) {
      const double value = work[part * step + 1 + e];
      const double factor = space.scratch[part];
      sum = fma(value, factor, sum);
    }
    space.gram[e] = sum;
  }
  __syncthreads();
}

// first_bad: the smallest batch index of a matrix that is not finite; starts at a large number.
template <typename Shape, typename T>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) small_ends(
    GlobalPtr<const T> a,  // [batch, n, p]
    std::int64_t first,    // of the matrices, the one that the first block takes
    EndsPlan plan,
    Policy policy,
    Outputs out,
    SharedPtr<const double> work,  // that of ends_gram, from matrix `first` on
    GlobalPtr<int> first_bad) {
  SIMT_DYNAMIC_SHARED(double, shared);
  const SmallPlan& block = plan.block;
  const SmallSpace space(shared, block);
  const std::int64_t m = block.m;
  const int t = block.t;
  const std::int64_t b = first + blockIdx.x;
  const SharedPtr<const T> matrix = a + b * m * t;
  const bool in_parts = plan.parts > 0;
  const SharedPtr<const double> parts = work + blockIdx.x * (plan.parts * plan.part_doubles());
  const Bits largest = in_parts ? largest_of_parts(plan, parts, space.scratch)
                                : largest_magnitude<T>(matrix, m * t, space.scratch);
  if (largest >= kInfinityBits) {
    write_not_finite(out, b, m, t, first_bad);
    return;
  }
  const int exponent = scale_exponent(largest);
  const double scale = ldexp(1.0, exponent);
  const InputRows<T> rows = tall_rows<T>(matrix, m, t, block.transposed, exponent);
  if (in_parts) {
    add_parts(plan, parts, exponent, space);
  } else {
    accumulate_gram(block.gram, rows, 0, m, space.v, space.gram);
  }
  if (out.of_gram) {
    write_gram(out, block, space, b, scale);
  }
  const Triplets ends = extremes_by_tridiagonal<Shape>(
      rows, m, tridiagonal_space(block, space), space.gram, policy, out.long_max + b * m,
      out.long_min + b * m, out.short_max + b * t, out.short_min + b * t,
      [&](int rank, int multiplicity_max, std::int64_t multiplicity_min) {
        if (threadIdx.x == 0) {
          out.rank[b] = rank;
          out.multiplicity_max[b] = multiplicity_max;
          out.multiplicity_min[b] = multiplicity_min;
        }
      });
  if (threadIdx.x == 0) {
    write_extremes(out, b, ends.largest * scale, ends.smallest * scale);
    if (!ends.proven) {
      out.rank[b] = -1;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) small_extremes(
    GlobalPtr<const T> a,  // [batch, n, p]
    std::int64_t batch,
    SmallPlan plan,
    Policy policy,
    Outputs out,
    bool refused_only,
    SharedPtr<double> work,  // [grid, work_doubles()]
    GlobalPtr<int> first_bad) {
  SIMT_DYNAMIC_SHARED(double, shared);
  const SmallSpace space(shared, plan);
  const std::int64_t m = plan.m;
  const int t = plan.t;
  const int side = plan.side();
  work += blockIdx.x * plan.work_doubles();
  for (std::int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    const std::int64_t rank = refused_only ? out.rank[b] : -1;
    if (rank >= 0) {
      continue;
    }
    const SharedPtr<const T> matrix = a + b * m * t;
    const Bits largest = largest_magnitude<T>(matrix, m * t, space.scratch);
    if (largest >= kInfinityBits) {
      write_not_finite(out, b, m, t, first_bad);
      continue;
    }
    const int exponent = scale_exponent(largest);
    const double scale = ldexp(1.0, exponent);
    const InputRows<T> rows = tall_rows<T>(matrix, m, t, plan.transposed, exponent);
    accumulate_gram(plan.gram, rows, 0, m, space.v, space.gram);
    if (out.of_gram) {
      write_gram(out, plan, space, b, scale);
    }
    const SharedPtr<double> long_max = out.long_max + b * m;
    const SharedPtr<double> long_min = out.long_min + b * m;
    const SharedPtr<double> short_max = out.short_max + b * t;
    const SharedPtr<double> short_min = out.short_min + b * t;
    const int products = decompose_small<false>(rows, plan, space, work);
    const ClusterBounds found = find_extremes(space.sigma, t, policy);
    const int first = found.largest_index;
    const int second = found.smallest_index;
    if (products == 0) {
      unit_products(rows, 0, m, space.v, side, first, second, long_max, long_min, space.scratch);
      for (int j = static_cast<int>(threadIdx.x); j < t; j += static_cast<int>(blockDim.x)) {
        const double to_max = space.v[j * side + larger(first, 0)];
        const double to_min = space.v[j * side + larger(second, 0)];
        short_max[j] = first >= 0 ? to_max : 0.0;
        short_min[j] = second >= 0 ? to_min : 0.0;
      }
    } else {
      const WorkRows product = all_columns(work, side);
      unit_products(product, 0, m, space.v, side, first, second, long_max, long_min, space.scratch);
      unit_products(
          product, m, t, space.v, side, first, second, short_max, short_min, space.scratch);
    }
    if (threadIdx.x == 0) {
      write_values(out, b, found, scale);
    }
    __syncthreads();
  }
}

// What the tridiagonal form proves; the rest gets rank -1. False, and nothing is launched, where a
// block has no room for it. work: ends_step() times plan.work_doubles().
template <typename T>
bool launch_small_ends(
    GlobalPtr<const T> a,
    std::int64_t batch,  // below 2^31, a block each
    const EndsPlan& plan,
    const Policy& policy,
    const Outputs& out,
    SharedPtr<double> work,
    GlobalPtr<int> first_bad,
    Stream stream) {
  if (!ends_fit(plan, stream)) {
    return false;
  }
  const SmallPlan& block = plan.block;
  const SmallPlan& part = plan.part;
  const std::int64_t step = ends_step(plan, batch);
  for (std::int64_t first = 0; first < batch; first += step) {
    const std::int64_t rest = batch - first;
    const unsigned count = static_cast<unsigned>(step < rest ? step : rest);
    if (plan.parts > 0) {
      simt::launch(
          SIMT_KERNEL(ends_gram<T>), dim3(count * static_cast<unsigned>(plan.parts)),
          dim3(part.threads), part.shared_bytes(), stream, a + first * block.m * block.t, plan,
          work);
    }
    const auto launch_ends = [&](const auto& kernel) {
      simt::launch(
          kernel, dim3(count), dim3(block.threads), block.shared_bytes(), stream, a, first, plan,
          policy, out, work, first_bad);
    };
    if (block.t <= 32) {
      launch_ends(SIMT_KERNEL((small_ends<EndsTo32, T>)));
    } else if (block.t <= 64) {
      launch_ends(SIMT_KERNEL((small_ends<EndsTo64, T>)));
    } else {
      launch_ends(SIMT_KERNEL((small_ends<EndsTo128, T>)));
    }
  }
  return true;
}

template <typename T>
void launch_small_extremes(
    GlobalPtr<const T> a,
    std::int64_t batch,
    const SmallPlan& plan,
    const Policy& policy,
    const Outputs& out,
    bool refused_only,  // those with rank -1
    SharedPtr<double> work,
    unsigned grid,
    GlobalPtr<int> first_bad,
    Stream stream) {
  simt::launch(
      SIMT_KERNEL(small_extremes<T>), dim3(grid), dim3(plan.threads), plan.shared_bytes(), stream,
      a, batch, plan, policy, out, refused_only, work, first_bad);
}

// --- Gradient ------------------------------------------------------------------------------------
//
// d sigma = u^T dA v gives grad_A = g_max u_max v_max^T + g_min u_min v_min^T; for K = x^T x,
// lambda = sigma^2 and |K|_F^2 = |x x^T|_F^2 give
//     grad_x = 2 g_max sigma_max u v^T + 2 g_min sigma_min u v^T + 4 g_F x K,    x K = (x x^T) x.
// One pass over A writes all of it. At an extreme of multiplicity > 1 that pass leaves the rank-one
// term out, and small_cluster_gradient adds the mean of u_i v_i^T over the cluster, for which it
// decomposes that matrix again.

// The incoming gradients and what the forward pass left. lambda_* are null unless of_gram.
struct Incoming {
  SharedPtr<const double> grad_max, grad_min;                        // [batch]
  SharedPtr<const std::int64_t> multiplicity_max, multiplicity_min;  // [batch]
  SharedPtr<const double> u_max, v_max, u_min, v_min;                // [batch, n or p]
  SharedPtr<const double> lambda_max, lambda_min;                    // [batch], of_gram
  SharedPtr<const double> grad_squared_frobenius;                    // [batch], of_gram
  SharedPtr<const double> thin_gram;                                 // [batch, t, t], of_gram
  bool of_gram;
};

__device__ __forceinline__ bool is_cluster(double grad, std::int64_t multiplicity) {
  return multiplicity > 1 && grad != 0.0;
}

// Weights of u v^T for matrix b, 0 at a cluster.
struct RankOne {
  double max_weight, min_weight;

  __device__ __forceinline__ RankOne(const Incoming& in, std::int64_t b)
      : max_weight(in.grad_max[b]), min_weight(in.grad_min[b]) {
    if (in.of_gram) {
      const double lambda_max = in.lambda_max[b];
      const double lambda_min = in.lambda_min[b];
      max_weight *= 2.0 * sqrt(lambda_max);
      min_weight *= 2.0 * sqrt(lambda_min);
    }
    const double grad_max = in.grad_max[b];
    const double grad_min = in.grad_min[b];
    const std::int64_t multiplicity_max = in.multiplicity_max[b];
    const std::int64_t multiplicity_min = in.multiplicity_min[b];
    max_weight = is_cluster(grad_max, multiplicity_max) ? 0.0 : max_weight;
    min_weight = is_cluster(grad_min, multiplicity_min) ? 0.0 : min_weight;
  }
};

constexpr int kGradientChunk = 4096;  // elements a block writes

// grad = max_weight u_max v_max^T + min_weight u_min v_min^T.
template <typename T>
__global__ void __launch_bounds__(256) rank_one_gradient(
    Incoming in, std::int64_t batch, std::int64_t n, std::int64_t p, GlobalPtr<T> grad) {
  const std::int64_t chunks = ceil_div64(n * p, kGradientChunk);
  for (std::int64_t task = blockIdx.x; task < batch * chunks; task += gridDim.x) {
    const std::int64_t b = task / chunks;
    const std::int64_t begin = (task - b * chunks) * kGradientChunk;
    const std::int64_t rest = n * p - begin;
    const int count = rest < kGradientChunk ? static_cast<int>(rest) : kGradientChunk;
    const RankOne weights(in, b);
    const std::int64_t first_row = begin / p;
    const std::int64_t first_column = begin - first_row * p;
    for (int e = static_cast<int>(threadIdx.x); e < count; e += static_cast<int>(blockDim.x)) {
      const std::int64_t across = first_column + e;
      const std::int64_t down = across < p           ? 0
                                : p < kGradientChunk ? across / p
                                                     : 1;  // p >= chunk: at most one row on
      const std::int64_t row = first_row + down;
      const std::int64_t column = across - down * p;
      const double u_max = in.u_max[b * n + row];
      const double u_min = in.u_min[b * n + row];
      const double v_max = in.v_max[b * p + column];
      const double v_min = in.v_min[b * p + column];
      const double value =
          fma(weights.max_weight * u_max, v_max, weights.min_weight * u_min * v_min);
      grad[b * n * p + begin + e] = static_cast<T>(value);
    }
  }
}

constexpr int kProductTile = 64;   // rows and columns of grad per block
constexpr int kProductDepth = 16;  // inner dimension per step
constexpr int kProductThreads = 256;

// The same with 4 g_F x K: a tiled product of the thin Gram matrix with x, on the thin side.
// `wide`: n <= p, so the product is thin_gram x, else x thin_gram; the inner dimension is t either
// way.
template <typename T, bool wide>
__global__ void __launch_bounds__(kProductThreads) gram_gradient(
    Incoming in,
    GlobalPtr<const T> x,  // [batch, n, p]
    std::int64_t batch,
    std::int64_t n,
    std::int64_t p,
    GlobalPtr<T> grad) {
  constexpr int kStride = kProductTile + 1;
  SIMT_SHARED_ARRAY(double, left_tile, kProductDepth* kStride);   // [depth][row]
  SIMT_SHARED_ARRAY(double, right_tile, kProductDepth* kStride);  // [depth][column]
  constexpr int kPerThread = kProductTile / 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int row_lane = thread / 16;
  const int column_lane = thread % 16;
  const std::int64_t t = wide ? n : p;
  const std::int64_t row_tiles = ceil_div64(n, kProductTile);
  const std::int64_t column_tiles = ceil_div64(p, kProductTile);
  for (std::int64_t task = blockIdx.x; task < batch * row_tiles * column_tiles; task += gridDim.x) {
    const std::int64_t b = task / (row_tiles * column_tiles);
    const std::int64_t within = task - b * (row_tiles * column_tiles);
    const std::int64_t first_row = within / column_tiles * kProductTile;
    const std::int64_t first_column = within % column_tiles * kProductTile;
    const double grad_frobenius = in.grad_squared_frobenius[b];
    const double weight = 4.0 * grad_frobenius;
    const SharedPtr<const T> matrix = x + b * n * p;
    const SharedPtr<const double> gram = in.thin_gram + b * t * t;
    double sum[kPerThread][kPerThread] = {};
    // Without a gradient of |K|_F^2 nothing is multiplied: an overflow there must not give NaN.
    for (std::int64_t depth = 0; weight != 0.0 && depth < t; depth += kProductDepth) {
      __syncthreads();
      for (int e = thread; e < kProductDepth * kProductTile; e += kProductThreads) {
        const int inner = e % kProductDepth;
        const int outer = e / kProductDepth;
        const std::int64_t row = first_row + outer;
        const std::int64_t k = depth + inner;
        double value = 0.0;
        if (row < n && k < t) {
          if constexpr (wide) {
            const double element = gram[row * t + k];
            value = weight * element;
          } else {
            const T element = matrix[row * p + k];
            value = static_cast<double>(element);
          }
        }
        left_tile[inner * kStride + outer] = value;
      }
      for (int e = thread; e < kProductDepth * kProductTile; e += kProductThreads) {
        const int outer = e % kProductTile;
        const int inner = e / kProductTile;
        const std::int64_t column = first_column + outer;
        const std::int64_t k = depth + inner;
        double value = 0.0;
        if (column < p && k < t) {
          if constexpr (wide) {
            const T element = matrix[k * p + column];
            value = static_cast<double>(element);
          } else {
            const double element = gram[k * t + column];
            value = weight * element;
          }
        }
        right_tile[inner * kStride + outer] = value;
      }
      __syncthreads();
      for (int k = 0; k < kProductDepth; ++k) {
        double left[kPerThread];
        double right[kPerThread];
        for (int c = 0; c < kPerThread; ++c) {
          left[c] = left_tile[k * kStride + row_lane + 16 * c];
          right[c] = right_tile[k * kStride + column_lane + 16 * c];
        }
        for (int c = 0; c < kPerThread; ++c) {
          for (int d = 0; d < kPerThread; ++d) {
            sum[c][d] = fma(left[c], right[d], sum[c][d]);
          }
        }
      }
    }
    const RankOne weights(in, b);
    for (int c = 0; c < kPerThread; ++c) {
      const std::int64_t row = first_row + row_lane + 16 * c;
      if (row >= n) {
        continue;
      }
      const double u_max = in.u_max[b * n + row];
      const double u_min = in.u_min[b * n + row];
      for (int d = 0; d < kPerThread; ++d) {
        const std::int64_t column = first_column + column_lane + 16 * d;
        if (column < p) {
          const double v_max = in.v_max[b * p + column];
          const double v_min = in.v_min[b * p + column];
          const double value = fma(
              weights.max_weight * u_max, v_max, fma(weights.min_weight * u_min, v_min, sum[c][d]));
          grad[(b * n + row) * p + column] = static_cast<T>(value);
        }
      }
    }
  }
}

// Everything but the clusters, in one pass.
template <typename T>
void launch_gradient(
    const Incoming& in,
    GlobalPtr<const T> a,
    std::int64_t batch,
    std::int64_t n,
    std::int64_t p,
    GlobalPtr<T> grad,
    Stream stream) {
  constexpr std::int64_t kMostBlocks = std::int64_t{1} << 30;
  const auto grid = [](std::int64_t tasks) {
    return dim3(static_cast<unsigned>(tasks < kMostBlocks ? tasks : kMostBlocks));
  };
  if (!in.of_gram) {
    const std::int64_t elements = n * p;
    const unsigned threads =
        elements < 256 ? static_cast<unsigned>(ceil_div64(elements, 32)) * 32 : 256;
    const std::int64_t tasks = batch * ceil_div64(elements, kGradientChunk);
    simt::launch(
        SIMT_KERNEL(rank_one_gradient<T>), grid(tasks), dim3(threads), 0, stream, in, batch, n, p,
        grad);
    return;
  }
  const dim3 blocks = grid(batch * ceil_div64(n, kProductTile) * ceil_div64(p, kProductTile));
  if (n <= p) {
    simt::launch(
        SIMT_KERNEL(gram_gradient<T, true>), blocks, dim3(kProductThreads), 0, stream, in, a, batch,
        n, p, grad);
  } else {
    simt::launch(
        SIMT_KERNEL(gram_gradient<T, false>), blocks, dim3(kProductThreads), 0, stream, in, a,
        batch, n, p, grad);
  }
}

// Which extremes of matrix b are clusters with a gradient: the same answer for all threads. A zero
// vector marks an extreme whose gradient is zero however many values coincide.
struct ClustersAsked {
  bool max, min;

  __device__ __forceinline__ ClustersAsked(bool max, bool min) : max(max), min(min) {}

  __device__ __forceinline__ ClustersAsked(
      const Incoming& in,
      std::int64_t b,
      SharedPtr<const double> v_max,
      SharedPtr<const double> v_min,
      std::int64_t p) {
    const double grad_max = in.grad_max[b];
    const double grad_min = in.grad_min[b];
    const std::int64_t multiplicity_max = in.multiplicity_max[b];
    const std::int64_t multiplicity_min = in.multiplicity_min[b];
    bool any_max = false;
    bool any_min = false;
    for (std::int64_t e = threadIdx.x; e < p; e += blockDim.x) {
      const double x = v_max[b * p + e];
      const double y = v_min[b * p + e];
      any_max = any_max || x != 0.0;
      any_min = any_min || y != 0.0;
    }
    max = is_cluster(grad_max, multiplicity_max);
    min = is_cluster(grad_min, multiplicity_min);
    if (max || min) {
      max = __syncthreads_or(any_max ? 1 : 0) != 0 && max;
      min = __syncthreads_or(any_min ? 1 : 0) != 0 && min;
    }
  }
};

// Weight of b_i v_i^T, b_i = sigma_i u_i in scaled units: the mean over the cluster of u_i v_i^T,
// or of 2 sigma_i u_i v_i^T.
__device__ __forceinline__ double cluster_weight(
    const Incoming& in,
    std::int64_t b,
    const ClustersAsked& asked,
    const ClusterBounds& found,
    double sigma,
    double scale) {
  double weight = 0.0;
  if (asked.max && found.in_max(sigma)) {
    const double grad = in.grad_max[b];
    weight += grad / static_cast<double>(found.multiplicity_max);
  }
  if (asked.min && found.in_min(sigma)) {
    const double grad = in.grad_min[b];
    weight += grad / static_cast<double>(found.multiplicity_min);
  }
  if (weight == 0.0) {
    return 0.0;
  }
  return in.of_gram ? 2.0 * scale * weight : weight / sigma;
}

// Element e, in the order in which grad lies in memory, of sum_c weights_c b_c v_c^T; `work` holds
// B and, under it, V.
__device__ __forceinline__ double cluster_element(
    SharedPtr<const double> work,
    SharedPtr<const double> weights,
    std::int64_t e,
    std::int64_t m,
    int t,
    int side,
    bool transposed) {
  const std::int64_t i = transposed ? e % m : e / t;
  const std::int64_t j = transposed ? e / m : e % t;
  double sum = 0.0;
  for (int c = 0; c < t; ++c) {
    const double weight = weights[c];
    if (weight != 0.0) {
      const double left = work[i * side + c];
      const double right = work[(m + j) * side + c];
      sum = fma(weight * left, right, sum);
    }
  }
  return sum;
}

// Adds the cluster means to grad; blocks whose matrices have none return at once. With float32 the
// sum is rounded once more than a single pass would.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) small_cluster_gradient(
    Incoming in,
    GlobalPtr<const T> a,  // [batch, n, p]
    std::int64_t batch,
    SmallPlan plan,
    Policy policy,
    SharedPtr<double> work,  // [grid, work_doubles()]
    GlobalPtr<T> grad) {
  SIMT_DYNAMIC_SHARED(double, shared);
  const SmallSpace space(shared, plan);
  const std::int64_t m = plan.m;
  const int t = plan.t;
  const int side = plan.side();
  const std::int64_t p = plan.transposed ? m : t;
  work += blockIdx.x * plan.work_doubles();
  for (std::int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    const ClustersAsked asked(in, b, in.v_max, in.v_min, p);
    if (!asked.max && !asked.min) {
      continue;
    }
    const SharedPtr<const T> matrix = a + b * m * t;
    const Bits largest = largest_magnitude<T>(matrix, m * t, space.scratch);
    const int exponent = scale_exponent(largest);
    const double scale = ldexp(1.0, exponent);
    const InputRows<T> rows = tall_rows<T>(matrix, m, t, plan.transposed, exponent);
    accumulate_gram(plan.gram, rows, 0, m, space.v, space.gram);
    decompose_small<true>(rows, plan, space, work);
    const ClusterBounds found = find_extremes(space.sigma, t, policy);
    for (int i = static_cast<int>(threadIdx.x); i < t; i += static_cast<int>(blockDim.x)) {
      const double sigma = space.sigma[i];
      space.norms[i] = cluster_weight(in, b, asked, found, sigma, scale);
    }
    __syncthreads();
    for (std::int64_t e = threadIdx.x; e < m * t; e += blockDim.x) {
      const double sum = cluster_element(work, space.norms, e, m, t, side, plan.transposed);
      const T before = grad[b * m * t + e];
      grad[b * m * t + e] = static_cast<T>(static_cast<double>(before) + sum);
    }
    __syncthreads();
  }
}

template <typename T>
void launch_small_cluster_gradient(
    const Incoming& in,
    GlobalPtr<const T> a,
    std::int64_t batch,
    const SmallPlan& plan,
    const Policy& policy,
    SharedPtr<double> work,
    unsigned grid,
    GlobalPtr<T> grad,
    Stream stream) {
  simt::launch(
      SIMT_KERNEL(small_cluster_gradient<T>), dim3(grid), dim3(plan.threads), plan.shared_bytes(),
      stream, in, a, batch, plan, policy, work, grad);
}

}  // namespace immunize_ext::spectrum
