// Regularised key/value merge on a GPU, the part shared by all layers, in float64: what no library
// has, a Cholesky factorisation of T = Z'^T Z' with pivots, which finds repeated rows of C; and, for
// up to 128 tokens, what lies between the products with Z, for which a library needs a launch a line
// (merge_solve.h has the derivation, and is the route for more tokens):
//
//   merge_pivoted_cholesky   T = Z^T Z + diag(1 / mu), its pivots and its factor R^T
//   merge_orthonormalise     first = R^-T Z'^T in the order of the pivots, and R^-T
//   merge_finish_root        correction = (first first^T)^(-1/2), root and defect
//
// A block of the first and the last does one problem of the batch, a thread of the second one
// column. Nothing waits for the host.
#pragma once

#include <algorithm>

#include "portable.cuh"
#include "storage.cuh"

namespace immunize_ext::merge {

using simt::GlobalPtr;
using simt::SharedPtr;
using simt::Stream;

constexpr int kSolveThreads = 256;

// Results for a batch, see Pivoted in merge_solve.h; factor is scratch, its column k lies at
// factor[k, :].
struct PivotedProblem {
  GlobalPtr<double> t;                       // [batch, s, s], symmetric; Z^T Z, then T
  GlobalPtr<const double> inverse_hardness;  // [batch, s], 1 / mu
  GlobalPtr<double> triangle;                // [batch, s, s]
  GlobalPtr<std::int64_t> order;             // [batch, s]
  GlobalPtr<std::int64_t> rank;              // [batch]
  GlobalPtr<double> factor;                  // [batch, s, s]
  std::int64_t batch, s;
  double rank_rtol;
};

// Shared memory of a problem, in doubles: pivots, scales, kept rows.
constexpr std::int64_t pivoted_doubles(std::int64_t s) {
  return 3 * s;
}

// The first place of the largest pivot, to all threads.
__device__ __forceinline__ int find_pivot(SharedPtr<double> pivot, int s, double* value) {
  SIMT_SHARED_ARRAY(double, best_value, kSolveThreads / 32);
  SIMT_SHARED_ARRAY(int, best_place, kSolveThreads / 32);
  double largest = -2;
  int place = 0;
  for (int j = static_cast<int>(threadIdx.x); j < s; j += kSolveThreads) {
    const double candidate = pivot[j];
    if (candidate > largest) {  // the first of equals stays
      largest = candidate;
      place = j;
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(0xFFFFFFFF, largest, offset);
    const int other_place = __shfl_xor_sync(0xFFFFFFFF, place, offset);
    if (other > largest || (other == largest && other_place < place)) {
      largest = other;
      place = other_place;
    }
  }
  __syncthreads();  // everybody is done with the result of the step before
  if (threadIdx.x % 32 == 0) {
    best_value[threadIdx.x / 32] = largest;
    best_place[threadIdx.x / 32] = place;
  }
  __syncthreads();
  for (int i = 0; i < kSolveThreads / 32; ++i) {
    const double other = best_value[i];
    const int other_place = best_place[i];
    if (other > largest || (other == largest && other_place < place)) {
      largest = other;
      place = other_place;
    }
  }
  *value = largest;
  return place;
}

// One T (s x s) by all threads of a block. T is scaled to unit diagonal, so a pivot is the squared
// sine of the angle between a row and the span of those already kept, and the tolerance has no
// units. Of equal rows the first is kept.
__device__ __forceinline__ void factorise(
    const PivotedProblem& p, std::int64_t batch, SharedPtr<double> memory) {
  const int s = static_cast<int>(p.s);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t matrix = batch * p.s * p.s;
  const GlobalPtr<double> t = p.t + matrix;
  const GlobalPtr<double> factor = p.factor + matrix;
  const GlobalPtr<double> triangle = p.triangle + matrix;
  const GlobalPtr<std::int64_t> order = p.order + batch * p.s;
  const SharedPtr<double> pivot = memory;     // below 0: the row is kept
  const SharedPtr<double> scale = pivot + s;  // square roots of the diagonal
  const SharedPtr<std::int64_t> kept = simt::pointer_cast<std::int64_t>(scale + s);

  for (int j = thread; j < s; j += kSolveThreads) {
    double diagonal = t[std::int64_t{j} * s + j];
    diagonal += p.inverse_hardness[batch * p.s + j];
    t[std::int64_t{j} * s + j] = diagonal;
    // A zero row of C constrains nothing.
    scale[j] = diagonal > 0 ? sqrt(diagonal) : 1.0;
    pivot[j] = diagonal > 0 ? 1.0 : 0.0;
  }
  __syncthreads();
  int rank = 0;
  for (; rank < s; ++rank) {
    double value;
    const int best = find_pivot(pivot, s, &value);
    if (!(value > p.rank_rtol)) {
      break;
    }
    const double diagonal = sqrt(value);
    const double best_scale = scale[best];
    for (int j = thread; j < s; j += kSolveThreads) {
      const double old = pivot[j];
      double entry = 0;  // of a row that is kept already
      if (j == best) {
        entry = diagonal;
        pivot[j] = -1.0;
        kept[rank] = j;
      } else if (old >= 0) {
        const double row_scale = scale[j];
        entry = t[std::int64_t{j} * s + best];
        entry /= row_scale * best_scale;
        for (int k = 0; k < rank; ++k) {
          const double mine = factor[std::int64_t{k} * s + j];
          const double other = factor[std::int64_t{k} * s + best];
          entry -= mine * other;
        }
        entry /= diagonal;
        pivot[j] = max(0.0, old - entry * entry);
      }
      factor[std::int64_t{rank} * s + j] = entry;
    }
    __syncthreads();
  }
  __syncthreads();
  if (thread == 0) {
    p.rank[batch] = rank;
    std::int64_t next = rank;
    for (int j = 0; j < s; ++j) {
      const double left = pivot[j];
      if (!(left < 0)) {
        kept[next++] = j;
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < s; i += kSolveThreads) {
    const std::int64_t row = kept[i];
    order[i] = row;
  }
  for (std::int64_t i = thread; i < std::int64_t{s} * s; i += kSolveThreads) {
    const std::int64_t row = i / s, column = i % s;
    double entry = row == column ? 1.0 : 0.0;
    if (row < rank && column < rank) {
      const std::int64_t owner = kept[row];
      const double row_scale = scale[owner];
      entry = 0;
      if (column <= row) {
        entry = factor[column * s + owner];
        entry *= row_scale;
      }
    }
    triangle[i] = entry;
  }
  __syncthreads();
}

static __global__ void __launch_bounds__(kSolveThreads, 1)
    merge_pivoted_cholesky(const PivotedProblem p) {
  SIMT_DYNAMIC_SHARED(double, memory);
  for (std::int64_t i = blockIdx.x; i < p.batch; i += gridDim.x) {
    factorise(p, i, memory);
  }
}

// --- Root and basis, for few tokens ---------------------------------------------------------------

constexpr std::int64_t kFewTokens = 128;
constexpr int kColumnThreads = 64;

// The columns of first: Z'^T = [ Z^T | diag(1 / mu)^(1/2) ], and the identity for R^-T. Rows are in
// the order of the pivots, and zero where a row of C was not kept.
struct OrthonormalProblem {
  GlobalPtr<const double> z;                 // [batch, s, d], Z^T
  GlobalPtr<const double> inverse_hardness;  // [batch, s]
  GlobalPtr<const double> triangle;          // [batch, s, s]
  GlobalPtr<const std::int64_t> order;       // [batch, s]
  GlobalPtr<const std::int64_t> rank;        // [batch]
  GlobalPtr<double> first;                   // [batch, s, d + s]
  GlobalPtr<double> inverse;                 // [batch, s, s], R^-T
  std::int64_t batch, s, d;
};

// A thread solves with one column, from top to bottom; it is alone with its part of shared memory.
static __global__ void __launch_bounds__(kColumnThreads)
    merge_orthonormalise(const OrthonormalProblem p) {
  SIMT_DYNAMIC_SHARED(double, memory);  // [s, kColumnThreads]
  const int s = static_cast<int>(p.s);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t wide = p.d + p.s, columns = wide + p.s;
  const std::int64_t step = std::int64_t{gridDim.x} * kColumnThreads;
  for (std::int64_t at = std::int64_t{blockIdx.x} * kColumnThreads + thread; at < p.batch * columns;
       at += step) {
    const std::int64_t batch = at / columns, column = at % columns;
    const std::int64_t rank = p.rank[batch];
    for (int i = 0; i < s; ++i) {
      double left = 0;
      if (i < rank) {
        const std::int64_t row = p.order[batch * p.s + i];
        if (column < p.d) {
          left = p.z[(batch * p.s + row) * p.d + column];
        } else if (column < wide) {
          if (row == column - p.d) {
            const double soft = p.inverse_hardness[batch * p.s + row];
            left = sqrt(soft);
          }
        } else {
          left = i == column - wide ? 1.0 : 0.0;
        }
      }
      const GlobalPtr<const double> factors = p.triangle + (batch * p.s + i) * p.s;
      double sums[4] = {};
      int j = 0;
      for (; j + 4 <= i; j += 4) {
        IMMUNIZE_EXT_UNROLL
        for (int v = 0; v < 4; ++v) {
          const double factor = factors[j + v], solved = memory[(j + v) * kColumnThreads + thread];
          sums[v] += factor * solved;
        }
      }
      for (; j < i; ++j) {
        const double factor = factors[j], solved = memory[j * kColumnThreads + thread];
        sums[0] += factor * solved;
      }
      const double pivot = factors[i];
      const double entry = (left - ((sums[0] + sums[1]) + (sums[2] + sums[3]))) / pivot;
      memory[i * kColumnThreads + thread] = entry;
      if (column < wide) {
        p.first[(batch * p.s + i) * wide + column] = entry;
      } else {
        p.inverse[(batch * p.s + i) * p.s + column - wide] = entry;
      }
    }
  }
}

// Matrices are [batch, s, s].
struct RootProblem {
  GlobalPtr<const double> gram;         // first first^T
  GlobalPtr<const double> inverse;      // R^-T
  GlobalPtr<const double> t;            // T
  GlobalPtr<const std::int64_t> order;  // [batch, s]
  GlobalPtr<std::int64_t> rank;         // [batch]; -1 where T is not finite
  GlobalPtr<double> correction;
  GlobalPtr<double> root;
  GlobalPtr<double> defect;
  GlobalPtr<double> scratch;  // [batch, 3, s, s]
  std::int64_t batch, s;
};

// Element (i, j) of A B, A^T B or A B^T for s x s matrices.
template <bool kLeftTransposed, bool kRightTransposed>
__device__ __forceinline__ double dot(
    SharedPtr<const double> a, SharedPtr<const double> b, int i, int j, int s) {
  double sum = 0;
  IMMUNIZE_EXT_UNROLL_BY(4)
  for (int k = 0; k < s; ++k) {
    const double left = a[kLeftTransposed ? k * s + i : i * s + k];
    const double right = b[kRightTransposed ? j * s + k : k * s + j];
    sum += left * right;
  }
  return sum;
}

// correction = gram^(-1/2) by Newton and Schulz, root = R^-1 correction with its rows where they
// belong, defect = I - root root^T T in the columns of rows that were not kept.
__device__ __forceinline__ void finish_root(const RootProblem& p, std::int64_t batch) {
  const int s = static_cast<int>(p.s);
  const int thread = static_cast<int>(threadIdx.x), size = s * s;
  const std::int64_t matrix = batch * p.s * p.s;
  const SharedPtr<double> gram = p.scratch + 3 * matrix;
  const SharedPtr<double> one = gram + size, two = one + size;
  const SharedPtr<double> correction = p.correction + matrix, root = p.root + matrix;
  const SharedPtr<const double> inverse = p.inverse + matrix, t = p.t + matrix;
  const GlobalPtr<const std::int64_t> order = p.order + batch * p.s;
  const std::int64_t kept = p.rank[batch];
  bool finite = true;
  for (int at = thread; at < size; at += kSolveThreads) {
    const double unit = at / s == at % s ? 1.0 : 0.0;
    double entry = p.gram[matrix + at];
    if (at / s >= kept) {
      entry = unit;  // nothing else is there
    }
    gram[at] = entry;
    correction[at] = 1.5 * unit - 0.5 * entry;
    const double of_t = t[at];
    finite = finite && of_t - of_t == 0.0;
  }
  const int infinite = __syncthreads_or(!finite);
  for (int step = 0; step < 2; ++step) {
    for (int at = thread; at < size; at += kSolveThreads) {
      one[at] = dot<false, false>(correction, correction, at / s, at % s, s);
      two[at] = dot<false, false>(correction, gram, at / s, at % s, s);
    }
    __syncthreads();
    for (int at = thread; at < size; at += kSolveThreads) {
      const double old = correction[at];
      correction[at] = 1.5 * old - 0.5 * dot<false, false>(one, two, at / s, at % s, s);
    }
    __syncthreads();
  }
  for (int at = thread; at < size; at += kSolveThreads) {
    const std::int64_t row = order[at / s];
    root[row * s + at % s] = dot<true, true>(inverse, correction, at / s, at % s, s);
  }
  __syncthreads();
  if (kept < p.s) {
    for (int at = thread; at < size; at += kSolveThreads) {
      one[at] = dot<true, false>(root, t, at / s, at % s, s);
    }
    __syncthreads();
  }
  for (int at = thread; at < size; at += kSolveThreads) {
    const int row = at / s, place = at % s;
    const std::int64_t column = order[place];
    double entry = 0;
    if (place >= kept) {
      const double unit = row == column ? 1.0 : 0.0;
      entry = unit - dot<false, false>(root, one, row, static_cast<int>(column), s);
    }
    p.defect[matrix + std::int64_t{row} * s + column] = entry;
  }
  if (thread == 0 && infinite != 0) {
    p.rank[batch] = -1;
  }
}

static __global__ void __launch_bounds__(kSolveThreads, 1) merge_finish_root(const RootProblem p) {
  for (std::int64_t i = blockIdx.x; i < p.batch; i += gridDim.x) {
    finish_root(p, i);
    __syncthreads();
  }
}

// Blocks, as many as may wait at a time.
inline dim3 solve_grid(std::int64_t blocks) {
  return dim3(static_cast<unsigned>(std::min<std::int64_t>(blocks, 0x7FFFFFFF)));
}

#if defined(IMMUNIZE_EXT_WITH_CUDA) && !defined(__CUDACC__)

void launch_pivoted_cholesky(const PivotedProblem& p, Stream stream);
void launch_orthonormalise(const OrthonormalProblem& p, Stream stream);
void launch_finish_root(const RootProblem& p, Stream stream);

#else

IMMUNIZE_EXT_LAUNCHER void launch_pivoted_cholesky(const PivotedProblem& p, Stream stream) {
  if (p.batch == 0 || p.s == 0) {
    return;
  }
  const std::size_t bytes = static_cast<std::size_t>(pivoted_doubles(p.s)) * sizeof(double);
  simt::launch(
      SIMT_KERNEL(merge_pivoted_cholesky), solve_grid(p.batch), dim3(kSolveThreads), bytes, stream,
      p);
}

IMMUNIZE_EXT_LAUNCHER void launch_orthonormalise(const OrthonormalProblem& p, Stream stream) {
  if (p.batch == 0 || p.s == 0) {
    return;
  }
  const std::int64_t columns = p.batch * (p.d + 2 * p.s);
  const std::size_t bytes = static_cast<std::size_t>(p.s) * kColumnThreads * sizeof(double);
  simt::launch(
      SIMT_KERNEL(merge_orthonormalise),
      solve_grid((columns + kColumnThreads - 1) / kColumnThreads), dim3(kColumnThreads), bytes,
      stream, p);
}

IMMUNIZE_EXT_LAUNCHER void launch_finish_root(const RootProblem& p, Stream stream) {
  if (p.batch == 0 || p.s == 0) {
    return;
  }
  simt::launch(
      SIMT_KERNEL(merge_finish_root), solve_grid(p.batch), dim3(kSolveThreads), 0, stream, p);
}

#endif

}  // namespace immunize_ext::merge
