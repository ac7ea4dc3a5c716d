// Extremal singular values and cluster gradients for matrices whose thin side is beyond the shared
// memory of one block: blocked one-sided Jacobi in global memory, many blocks per matrix.
//
// The columns of B (starting as M) are cut into an even number of column blocks. A round pairs them
// up by the tournament of spectrum_jacobi.cuh and makes each pair's columns more orthogonal,
// exactly as the small route does with all columns: Gram matrix of the pair, two-sided Jacobi on
// it, product with the rotations; under B lie the rows of the product of all rotations. A sweep is
// one round of every pairing. Each round is three launches (Gram matrices over row chunks,
// rotations, products over row chunks), whose order on the stream is the only synchronisation.
//
// A sweep in which no pair of columns was further from orthogonal than sqrt(m) eps |b_i| |b_j| ends
// the work: the device remembers that, and the launches of later sweeps return at once. So the host
// need not know; a caller that may wait (Watch) looks after each, and saves these launches. Every
// product is backward stable, the test is relative to both columns, so sigma_i = |b_i| has the
// accuracy of the small route (with de Rijk, "A one-sided Jacobi algorithm for computing the
// singular value decomposition on a vector computer", SIAM J. Sci. Stat. Comput. 10, 1989).
#pragma once

#include "spectrum.cuh"

namespace immunize_ext::spectrum {

constexpr int kColumnBlock = 32;
constexpr int kLargeSweeps = 40;  // of all pairs; 7 to 20 are needed
constexpr int kInnerSweeps = 4;   // of one pair: to go further than the other pairs is in vain
constexpr int kLargeThreads = 256;
constexpr int kChunkRows = 256;
constexpr int kScaleChunk = 1 << 16;

// How the blocks of a launch work on a batch of matrices of one shape.
struct LargePlan {
  std::int64_t m;
  int t;
  bool transposed;
  int column_block;
  int side;        // t, filled with zero columns to a whole number of pairs of column blocks
  GramShape gram;  // of a pair
  int multiply_rows;
  int gram_region;  // doubles of shared memory; `v` and a tile need as much or less

  __host__ __device__ int pair_side() const {
    return 2 * column_block;
  }
  __host__ __device__ int pairs() const {
    return side / pair_side();
  }
  __host__ __device__ int rounds() const {
    return 2 * pairs() - 1;
  }
  __host__ __device__ std::int64_t rows() const {
    return m + side;
  }
  __host__ __device__ std::int64_t gram_chunks() const {
    return ceil_div64(m, kChunkRows);
  }
  __host__ __device__ std::int64_t row_chunks() const {
    return ceil_div64(rows(), kChunkRows);
  }
  // Workspace for each matrix.
  __host__ __device__ std::int64_t work_doubles() const {
    return rows() * side;
  }
  __host__ __device__ std::int64_t partial_doubles() const {
    return pairs() * gram_chunks() * packed_size(pair_side());
  }
  __host__ __device__ std::int64_t rotation_doubles() const {
    return std::int64_t{pairs()} * pair_side() * pair_side();
  }
  __host__ __device__ std::int64_t flags() const {
    return 2 + kLargeSweeps + pairs();
  }
  double tolerance() const {
    return kEps * (m < 64 ? 8.0 : sqrt(static_cast<double>(m)));
  }
};

inline LargePlan large_plan(std::int64_t n, std::int64_t p, int column_block = kColumnBlock) {
  LargePlan plan{};
  plan.transposed = n <= p;
  plan.m = plan.transposed ? p : n;
  plan.t = static_cast<int>(plan.transposed ? n : p);
  plan.column_block = column_block;
  const int pair = 2 * column_block;
  plan.side = ceil_div(plan.t, pair) * pair;
  plan.gram = GramShape{pair, ceil_div(pair, kRegisters), 32, 1};
  plan.gram_region = larger(packed_size(pair), plan.gram.tile_doubles());
  plan.multiply_rows = plan.gram_region / (pair + 1);
  return plan;
}

// All contiguous; the leading dimension is the batch.
struct LargeSpace {
  SharedPtr<double> work;      // [batch, m + side, side]
  SharedPtr<double> partial;   // [batch, pairs, gram_chunks, packed]
  SharedPtr<double> rotation;  // [batch, pairs, pair_side, pair_side]
  SharedPtr<double> sigma;     // [batch, side]
  SharedPtr<Bits> largest;     // [batch], zero at first: bits of the largest |entry|
  // [batch, flags()], zero at first: whether the gradient of sigma_max and of sigma_min is asked
  // for, whether anything was rotated in each sweep, whether each pair was in this round.
  SharedPtr<int> flags;
};

// largest[b] = the bits of max |a_b|.
template <typename T>
__global__ void __launch_bounds__(kLargeThreads)
    large_magnitude(GlobalPtr<const T> a, LargePlan plan, LargeSpace space) {
  SIMT_SHARED_ARRAY(double, scratch, kWarp);
  const std::int64_t elements = plan.m * plan.t;
  const std::int64_t chunks = ceil_div64(elements, kScaleChunk);
  const std::int64_t b = blockIdx.x / chunks;
  const std::int64_t begin = (blockIdx.x - b * chunks) * kScaleChunk;
  const std::int64_t rest = elements - begin;
  const Bits largest = largest_magnitude<T>(
      a + b * elements + begin, rest < kScaleChunk ? rest : kScaleChunk, scratch);
  if (threadIdx.x == 0) {
    atomicMax(&space.largest[b], largest);
  }
}

// work = [M; I], zero-padded columns. A matrix that is not finite becomes 0.
template <typename T>
__global__ void __launch_bounds__(kLargeThreads)
    large_prepare(GlobalPtr<const T> a, LargePlan plan, LargeSpace space) {
  constexpr int kTile = 32;
  SIMT_SHARED_ARRAY(double, tile, kTile*(kTile + 1));
  const std::int64_t column_tiles = ceil_div(plan.side, kTile);
  const std::int64_t row_tiles = ceil_div64(plan.rows(), kTile);
  const std::int64_t b = blockIdx.x / (row_tiles * column_tiles);
  const std::int64_t within = blockIdx.x - b * (row_tiles * column_tiles);
  const std::int64_t first_row = within / column_tiles * kTile;
  const int first_column = static_cast<int>(within % column_tiles) * kTile;
  const Bits largest = space.largest[b];
  const bool finite = largest < kInfinityBits;
  InputRows<T> rows = tall_rows<T>(
      a + b * plan.m * plan.t, plan.m, plan.t, plan.transposed, scale_exponent(largest));
  const int inside = finite ? plan.t - first_column : 0;
  rows.columns = inside < 0 ? 0 : inside < kTile ? inside : kTile;
  rows.data += first_column * rows.column_step;
  const std::int64_t rest = plan.m - first_row;
  const int count = rest < 0 ? 0 : rest < kTile ? static_cast<int>(rest) : kTile;
  load_tile(tile, kTile, rows, first_row, count);
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < kTile * kTile;
       e += static_cast<int>(blockDim.x)) {
    const int r = e / kTile;
    const int c = e % kTile;
    const std::int64_t row = first_row + r;
    const int column = first_column + c;
    if (row < plan.rows() && column < plan.side) {
      double value = row - plan.m == column ? 1.0 : 0.0;
      if (r < count) {
        value = tile[r * (kTile + 1) + c];
      }
      space.work[b * plan.work_doubles() + row * plan.side + column] = value;
    }
  }
}

// Which matrix, pair and chunk of rows a block has, and whether there is anything to do: not where
// no gradient is asked for, and not after a sweep without a rotation.
struct PairTask {
  std::int64_t b, chunk;
  int pair;
  bool idle;

  __device__ __forceinline__
  PairTask(const LargePlan& plan, const LargeSpace& space, std::int64_t chunks, int sweep) {
    const std::int64_t of_pair = blockIdx.x / chunks;
    chunk = blockIdx.x - of_pair * chunks;
    b = of_pair / plan.pairs();
    pair = static_cast<int>(of_pair - b * plan.pairs());
    const SharedPtr<int> flags = space.flags + b * plan.flags();
    const int asked_max = flags[0];
    const int asked_min = flags[1];
    int rotated = 1;
    if (sweep > 0) {
      rotated = flags[2 + sweep - 1];
    }
    idle = (asked_max == 0 && asked_min == 0) || rotated == 0;
  }

  __device__ __forceinline__ WorkRows
  columns(const LargePlan& plan, const LargeSpace& space, int round) const {
    const Pair blocks = tournament_pair(pair, round, 2 * plan.pairs());
    return WorkRows{
        space.work + b * plan.work_doubles(),
        plan.side,
        plan.pair_side(),
        plan.column_block,
        std::int64_t{blocks.p} * plan.column_block,
        std::int64_t{blocks.q} * plan.column_block};
  }
  __device__ __forceinline__ std::int64_t index(const LargePlan& plan) const {
    return b * plan.pairs() + pair;
  }
};

static __global__ void __launch_bounds__(kLargeThreads)
    large_pair_gram(LargePlan plan, LargeSpace space, int sweep, int round) {
  SIMT_DYNAMIC_SHARED(double, shared);
  const PairTask task(plan, space, plan.gram_chunks(), sweep);
  if (task.idle) {
    return;
  }
  const SharedPtr<double> gram = shared;
  const SharedPtr<double> tile = gram + packed_size(plan.pair_side());
  const std::int64_t begin = task.chunk * kChunkRows;
  const std::int64_t end = begin + kChunkRows < plan.m ? begin + kChunkRows : plan.m;
  accumulate_gram(plan.gram, task.columns(plan, space, round), begin, end, tile, gram);
  const int packed = packed_size(plan.pair_side());
  const SharedPtr<double> partial =
      space.partial + (task.index(plan) * plan.gram_chunks() + task.chunk) * packed;
  for (int e = static_cast<int>(threadIdx.x); e < packed; e += static_cast<int>(blockDim.x)) {
    partial[e] = gram[e];
  }
}

static __global__ void __launch_bounds__(kLargeThreads)
    large_pair_rotation(LargePlan plan, LargeSpace space, double tolerance, int sweep) {
  SIMT_DYNAMIC_SHARED(double, shared);
  const PairTask task(plan, space, 1, sweep);
  if (task.idle) {
    return;
  }
  const int side = plan.pair_side();
  const int packed = packed_size(side);
  const SharedPtr<double> gram = shared;
  const SharedPtr<double> v = gram + packed;
  const SharedPtr<double> angles = v + side * side;
  const SharedPtr<double> partial = space.partial + task.index(plan) * plan.gram_chunks() * packed;
  for (int e = static_cast<int>(threadIdx.x); e < packed; e += static_cast<int>(blockDim.x)) {
    double total = 0.0;
    for (std::int64_t chunk = 0; chunk < plan.gram_chunks(); ++chunk) {
      const double part = partial[chunk * packed + e];
      total += part;
    }
    gram[e] = total;
  }
  __syncthreads();
  const bool rotated = diagonalise(gram, v, angles, side, tolerance, kZeroColumn, kInnerSweeps);
  const SharedPtr<int> flags = space.flags + task.b * plan.flags();
  if (threadIdx.x == 0) {
    flags[2 + kLargeSweeps + task.pair] = rotated ? 1 : 0;
    if (rotated) {
      atomicMax(&flags[2 + sweep], 1);
    }
  }
  if (rotated) {
    const SharedPtr<double> out = space.rotation + task.index(plan) * side * side;
    for (int e = static_cast<int>(threadIdx.x); e < side * side;
         e += static_cast<int>(blockDim.x)) {
      out[e] = v[e];
    }
  }
}

static __global__ void __launch_bounds__(kLargeThreads)
    large_pair_product(LargePlan plan, LargeSpace space, int sweep, int round) {
  SIMT_DYNAMIC_SHARED(double, shared);
  const PairTask task(plan, space, plan.row_chunks(), sweep);
  if (task.idle) {
    return;
  }
  const int rotated = space.flags[task.b * plan.flags() + 2 + kLargeSweeps + task.pair];
  if (rotated == 0) {
    return;
  }
  const int side = plan.pair_side();
  const SharedPtr<double> v = shared;
  const SharedPtr<double> tile = v + side * side;
  const SharedPtr<double> rotation = space.rotation + task.index(plan) * side * side;
  for (int e = static_cast<int>(threadIdx.x); e < side * side; e += static_cast<int>(blockDim.x)) {
    v[e] = rotation[e];
  }
  const std::int64_t begin = task.chunk * kChunkRows;
  const std::int64_t end = begin + kChunkRows < plan.rows() ? begin + kChunkRows : plan.rows();
  const WorkRows columns = task.columns(plan, space, round);
  multiply_rows(columns, begin, end, v, side, tile, plan.multiply_rows, columns);
}

constexpr int kNormColumns = 32;  // columns per block of large_norms

// sigma_i = |b_i|.
static __global__ void __launch_bounds__(kLargeThreads)
    large_norms(LargePlan plan, LargeSpace space) {
  constexpr int kLanes = kLargeThreads / kNormColumns;
  SIMT_SHARED_ARRAY(double, partial, kLargeThreads);
  const int groups = ceil_div(plan.side, kNormColumns);
  const std::int64_t b = blockIdx.x / groups;
  const int group = static_cast<int>(blockIdx.x - b * groups);
  const int column = group * kNormColumns + static_cast<int>(threadIdx.x) % kNormColumns;
  const SharedPtr<double> work = space.work + b * plan.work_doubles();
  double squares = 0.0;
  for (std::int64_t r = threadIdx.x / kNormColumns; column < plan.side && r < plan.m; r += kLanes) {
    const double value = work[r * plan.side + column];
    squares = fma(value, value, squares);
  }
  partial[threadIdx.x] = squares;
  __syncthreads();
  if (threadIdx.x < kNormColumns && column < plan.side) {
    double total = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const double part = partial[lane * kNormColumns + static_cast<int>(threadIdx.x)];
      total += part;
    }
    space.sigma[b * plan.side + column] = sqrt(total);
  }
}

// Values and vectors from B and the product of the rotations.
static __global__ void __launch_bounds__(kLargeThreads) large_results(
    LargePlan plan, LargeSpace space, Policy policy, Outputs out, GlobalPtr<int> first_bad) {
  const std::int64_t b = blockIdx.x;
  const std::int64_t m = plan.m;
  const int t = plan.t;
  const Bits largest = space.largest[b];
  if (largest >= kInfinityBits) {
    write_not_finite(out, b, m, t, first_bad);
    return;
  }
  const int side = plan.side;
  const ClusterBounds found = find_extremes(space.sigma + b * side, t, policy);
  const SharedPtr<double> work = space.work + b * plan.work_doubles();
  const int first = larger(found.largest_index, 0);
  const int second = larger(found.smallest_index, 0);
  const bool has_max = found.largest_index >= 0;
  const bool has_min = found.smallest_index >= 0;
  if (threadIdx.x == 0) {
    write_values(out, b, found, ldexp(1.0, scale_exponent(largest)));
  }
  const double max_factor = has_max ? 1.0 / found.largest : 0.0;
  const double min_factor = has_min ? 1.0 / found.smallest : 0.0;
  for (std::int64_t r = threadIdx.x; r < m; r += blockDim.x) {
    const double to_max = work[r * side + first];
    const double to_min = work[r * side + second];
    out.long_max[b * m + r] = to_max * max_factor;
    out.long_min[b * m + r] = to_min * min_factor;
  }
  for (std::int64_t j = threadIdx.x; j < t; j += blockDim.x) {
    const double to_max = work[(m + j) * side + first];
    const double to_min = work[(m + j) * side + second];
    out.short_max[b * t + j] = has_max ? to_max : 0.0;
    out.short_min[b * t + j] = has_min ? to_min : 0.0;
  }
}

// Every matrix is to be decomposed.
static __global__ void __launch_bounds__(kLargeThreads)
    large_ask_all(LargePlan plan, LargeSpace space, std::int64_t batch) {
  const std::int64_t b = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (b < batch) {
    space.flags[b * plan.flags()] = 1;
  }
}

// Only those whose gradient needs a cluster.
static __global__ void __launch_bounds__(kLargeThreads)
    large_ask_clusters(LargePlan plan, LargeSpace space, Incoming in) {
  const std::int64_t b = blockIdx.x;
  const ClustersAsked asked(in, b, in.v_max, in.v_min, plan.transposed ? plan.m : plan.t);
  if (threadIdx.x == 0) {
    space.flags[b * plan.flags()] = asked.max ? 1 : 0;
    space.flags[b * plan.flags() + 1] = asked.min ? 1 : 0;
  }
}

// sigma[b] becomes the weights of b_i v_i^T.
static __global__ void __launch_bounds__(kLargeThreads)
    large_cluster_weights(LargePlan plan, LargeSpace space, Policy policy, Incoming in) {
  const std::int64_t b = blockIdx.x;
  const SharedPtr<int> flags = space.flags + b * plan.flags();
  const int asked_max = flags[0];
  const int asked_min = flags[1];
  if (asked_max == 0 && asked_min == 0) {
    return;
  }
  const ClustersAsked asked(asked_max != 0, asked_min != 0);
  const SharedPtr<double> sigma = space.sigma + b * plan.side;
  const Bits largest = space.largest[b];
  const double scale = ldexp(1.0, scale_exponent(largest));
  const ClusterBounds found = find_extremes(sigma, plan.t, policy);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < plan.t; i += static_cast<int>(blockDim.x)) {
    const double value = sigma[i];
    sigma[i] = cluster_weight(in, b, asked, found, value, scale);
  }
}

// Adds the cluster means to grad.
template <typename T>
__global__ void __launch_bounds__(kLargeThreads)
    large_cluster_gradient(LargePlan plan, LargeSpace space, GlobalPtr<T> grad) {
  const std::int64_t elements = plan.m * plan.t;
  const std::int64_t chunks = ceil_div64(elements, kLargeThreads);
  const std::int64_t b = blockIdx.x / chunks;
  const int asked_max = space.flags[b * plan.flags()];
  const int asked_min = space.flags[b * plan.flags() + 1];
  const std::int64_t e = (blockIdx.x - b * chunks) * kLargeThreads + threadIdx.x;
  if ((asked_max == 0 && asked_min == 0) || e >= elements) {
    return;
  }
  const double sum = cluster_element(
      space.work + b * plan.work_doubles(), space.sigma + b * plan.side, e, plan.m, plan.t,
      plan.side, plan.transposed);
  const T before = grad[b * elements + e];
  grad[b * elements + e] = static_cast<T>(static_cast<double>(before) + sum);
}

inline dim3 large_grid(std::int64_t blocks) {
  return dim3(static_cast<unsigned>(blocks));
}

// Matrices that one call of the launchers may have: every grid stays below 2^31 blocks.
inline std::int64_t large_most_batch(const LargePlan& plan) {
  constexpr std::int64_t kMostBlocks = std::int64_t{1} << 30;
  constexpr int kTile = 32;
  const std::int64_t prepare = ceil_div(plan.side, kTile) * ceil_div64(plan.rows(), kTile);
  const std::int64_t add = ceil_div64(plan.m * plan.t, kLargeThreads);
  const std::int64_t product = plan.pairs() * plan.row_chunks();
  std::int64_t most = prepare > add ? prepare : add;
  most = most > product ? most : product;
  const std::int64_t batch = kMostBlocks / most;
  return batch < 1 ? 1 : batch;
}

// Lets the host stop early: rotated(context, sweep) tells whether any matrix was rotated in a
// sweep. Without it every sweep is launched, which a CUDA graph can capture.
struct Watch {
  bool (*rotated)(const void* context, int sweep) = nullptr;
  const void* context = nullptr;
};

// B with orthogonal columns, the product of the rotations and sigma, for the matrices that flags
// ask for.
template <typename T>
void launch_large_decomposition(
    GlobalPtr<const T> a,
    std::int64_t batch,
    const LargePlan& plan,
    const LargeSpace& space,
    const Watch& watch,
    Stream stream) {
  const dim3 block(kLargeThreads);
  simt::launch(
      SIMT_KERNEL(large_magnitude<T>), large_grid(batch * ceil_div64(plan.m * plan.t, kScaleChunk)),
      block, 0, stream, a, plan, space);
  simt::launch(
      SIMT_KERNEL(large_prepare<T>),
      large_grid(batch * ceil_div(plan.side, 32) * ceil_div64(plan.rows(), 32)), block, 0, stream,
      a, plan, space);
  const std::size_t side = static_cast<std::size_t>(plan.pair_side());
  const std::size_t packed = side * (side + 1) / 2;
  const std::size_t tile = static_cast<std::size_t>(plan.gram.tile_doubles());
  const std::size_t gram_bytes = sizeof(double) * (packed + tile);
  const std::size_t rotation_bytes = sizeof(double) * (packed + side * side + 2 * side);
  const std::size_t product_bytes =
      sizeof(double) * (side * side + static_cast<std::size_t>(plan.multiply_rows) * (side + 1));
  const auto gram = SIMT_KERNEL(large_pair_gram);
  const auto rotation = SIMT_KERNEL(large_pair_rotation);
  const auto product = SIMT_KERNEL(large_pair_product);
  const std::int64_t pairs = batch * plan.pairs();
  const double tolerance = plan.tolerance();
  for (int sweep = 0; sweep < kLargeSweeps; ++sweep) {
    // A look costs less than the launches of a sweep, and after a good start one or two are enough.
    if (sweep > 0 && watch.rotated != nullptr && !watch.rotated(watch.context, sweep - 1)) {
      break;
    }
    for (int round = 0; round < plan.rounds(); ++round) {
      simt::launch(
          gram, large_grid(pairs * plan.gram_chunks()), block, gram_bytes, stream, plan, space,
          sweep, round);
      simt::launch(
          rotation, large_grid(pairs), block, rotation_bytes, stream, plan, space, tolerance,
          sweep);
      simt::launch(
          product, large_grid(pairs * plan.row_chunks()), block, product_bytes, stream, plan, space,
          sweep, round);
    }
  }
  simt::launch(
      SIMT_KERNEL(large_norms), large_grid(batch * ceil_div(plan.side, kNormColumns)), block, 0,
      stream, plan, space);
}

template <typename T>
void launch_large_extremes(
    GlobalPtr<const T> a,
    std::int64_t batch,
    const LargePlan& plan,
    const LargeSpace& space,
    const Policy& policy,
    const Outputs& out,
    GlobalPtr<int> first_bad,
    const Watch& watch,
    Stream stream) {
  const dim3 block(kLargeThreads);
  simt::launch(
      SIMT_KERNEL(large_ask_all), large_grid(ceil_div64(batch, kLargeThreads)), block, 0, stream,
      plan, space, batch);
  launch_large_decomposition<T>(a, batch, plan, space, watch, stream);
  simt::launch(
      SIMT_KERNEL(large_results), large_grid(batch), block, 0, stream, plan, space, policy, out,
      first_bad);
}

template <typename T>
void launch_large_cluster_gradient(
    const Incoming& in,
    GlobalPtr<const T> a,
    std::int64_t batch,
    const LargePlan& plan,
    const LargeSpace& space,
    const Policy& policy,
    GlobalPtr<T> grad,
    const Watch& watch,
    Stream stream) {
  const dim3 block(kLargeThreads);
  simt::launch(
      SIMT_KERNEL(large_ask_clusters), large_grid(batch), block, 0, stream, plan, space, in);
  launch_large_decomposition<T>(a, batch, plan, space, watch, stream);
  simt::launch(
      SIMT_KERNEL(large_cluster_weights), large_grid(batch), block, 0, stream, plan, space, policy,
      in);
  simt::launch(
      SIMT_KERNEL(large_cluster_gradient<T>),
      large_grid(batch * ceil_div64(plan.m * plan.t, kLargeThreads)), block, 0, stream, plan, space,
      grad);
}

}  // namespace immunize_ext::spectrum
