// Regularised key/value merge on a GPU, the part shared by all layers, in float64: what no library
// has, a Cholesky factorisation of T = Z'^T Z' with pivots, which finds repeated rows of C.
// merge.cpp composes the rest of products and triangular solves.
//
// One block does one problem of the batch, and nothing waits for the host.
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
  GlobalPtr<const double> t;      // [batch, s, s], symmetric
  GlobalPtr<double> triangle;     // [batch, s, s]
  GlobalPtr<std::int64_t> order;  // [batch, s]
  GlobalPtr<std::int64_t> rank;   // [batch]
  GlobalPtr<double> factor;       // [batch, s, s]
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
  const GlobalPtr<const double> t = p.t + matrix;
  const GlobalPtr<double> factor = p.factor + matrix;
  const GlobalPtr<double> triangle = p.triangle + matrix;
  const GlobalPtr<std::int64_t> order = p.order + batch * p.s;
  const SharedPtr<double> pivot = memory;     // below 0: the row is kept
  const SharedPtr<double> scale = pivot + s;  // square roots of the diagonal
  const SharedPtr<std::int64_t> kept = simt::pointer_cast<std::int64_t>(scale + s);

  for (int j = thread; j < s; j += kSolveThreads) {
    const double diagonal = t[std::int64_t{j} * s + j];
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

// A block a problem, as many as may wait at a time.
inline dim3 solve_grid(std::int64_t batch) {
  return dim3(static_cast<unsigned>(std::min<std::int64_t>(batch, 0x7FFFFFFF)));
}

#if defined(IMMUNIZE_EXT_WITH_CUDA) && !defined(__CUDACC__)

void launch_pivoted_cholesky(const PivotedProblem& p, Stream stream);

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

#endif

}  // namespace immunize_ext::merge
