// Regularised key/value merge on a GPU, the part shared by all layers, in float64: what no library
// has, a Cholesky factorisation of T = Z'^T Z' with pivots, which finds repeated rows of C. merge.cpp
// composes the rest of products and triangular solves.
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

// Results for a batch; factor is scratch. The factor's column k lies at factor[k, :].
struct Root {
  GlobalPtr<double> root;        // [batch, s, s], E = root root^T; zero from column `rank` on
  GlobalPtr<double> factor;      // [batch, s, s], T = D F F^T D, first `rank` columns of F
  GlobalPtr<double> scale;       // [batch, s], the diagonal of D: square roots of that of T
  GlobalPtr<std::int64_t> rank;  // [batch]
  std::int64_t s;
  double rank_rtol;
};

// Shared memory of find_root, in doubles.
constexpr std::int64_t root_doubles(std::int64_t s) {
  return 3 * s + (s + 1) / 2;  // pivots, two kinds of reciprocals, kept rows as ints
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

// A root of E = T^-1 of one T (s x s) by all threads of a block. T is scaled to unit diagonal, so a
// pivot is the squared sine of the angle between a row and the span of those already kept, and the
// tolerance has no units. Of equal rows the first is kept. With S selecting the kept rows,
//   E = S^T (S T S^T)^-1 S = S^T (D L L^T D)^-1 S,   L the kept rows of F, lower triangular,
// so its root is S^T D^-1 L^-T.
__device__ __forceinline__ void find_root(
    const Root& p, GlobalPtr<const double> t, std::int64_t batch, SharedPtr<double> memory) {
  const int s = static_cast<int>(p.s);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t matrix = batch * p.s * p.s;
  const GlobalPtr<double> factor = p.factor + matrix;
  const GlobalPtr<double> root = p.root + matrix;
  const SharedPtr<double> pivot = memory;            // below 0: the row is kept
  const SharedPtr<double> unscale = pivot + s;       // 1 / D
  const SharedPtr<double> reciprocal = unscale + s;  // of the diagonal of L
  const SharedPtr<int> kept = simt::pointer_cast<int>(reciprocal + s);

  for (int j = thread; j < s; j += kSolveThreads) {
    const double diagonal = t[std::int64_t{j} * s + j];
    // A zero row of C constrains nothing.
    const double size = diagonal > 0 ? sqrt(diagonal) : 1.0;
    unscale[j] = 1.0 / size;
    p.scale[batch * p.s + j] = size;
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
    const double diagonal = sqrt(value), over_diagonal = 1.0 / diagonal;
    const double best_unscale = unscale[best];
    for (int j = thread; j < s; j += kSolveThreads) {
      const double old = pivot[j];
      double entry = 0;  // of a row that is kept already
      if (j == best) {
        entry = diagonal;
        pivot[j] = -1.0;
        kept[rank] = j;
        reciprocal[rank] = over_diagonal;
      } else if (old >= 0) {
        const double row_unscale = unscale[j];
        entry = t[std::int64_t{j} * s + best];
        entry *= row_unscale * best_unscale;
        for (int k = 0; k < rank; ++k) {
          const double mine = factor[std::int64_t{k} * s + j];
          const double other = factor[std::int64_t{k} * s + best];
          entry -= mine * other;
        }
        entry *= over_diagonal;
        pivot[j] = max(0.0, old - entry * entry);
      }
      factor[std::int64_t{rank} * s + j] = entry;
    }
    __syncthreads();
  }
  __syncthreads();
  if (thread == 0) {
    p.rank[batch] = rank;
  }

  for (std::int64_t i = thread; i < std::int64_t{s} * s; i += kSolveThreads) {
    root[i] = 0;
  }
  __syncthreads();
  // X = L^-1, a column a thread, each in the row of the root that it becomes.
  for (int column = thread; column < rank; column += kSolveThreads) {
    const int owner = kept[column];
    const GlobalPtr<double> x = root + std::int64_t{owner} * s;
    const double row_unscale = unscale[owner];
    for (int i = column; i < rank; ++i) {
      const int row = kept[i];
      double entry = i == column ? row_unscale : 0.0;
      for (int k = column; k < i; ++k) {
        const double left = factor[std::int64_t{k} * s + row];
        const double right = x[k];
        entry -= left * right;
      }
      const double over_diagonal = reciprocal[i];
      x[i] = entry * over_diagonal;
    }
  }
  __syncthreads();
}

static __global__ void __launch_bounds__(kSolveThreads, 1)
    merge_root(const Root p, GlobalPtr<const double> t, std::int64_t batch) {
  SIMT_DYNAMIC_SHARED(double, memory);
  for (std::int64_t i = blockIdx.x; i < batch; i += gridDim.x) {
    find_root(p, t + i * p.s * p.s, i, memory);
  }
}

// A block a problem, as many as may wait at a time.
inline dim3 solve_grid(std::int64_t batch) {
  return dim3(static_cast<unsigned>(std::min<std::int64_t>(batch, 0x7FFFFFFF)));
}

#if defined(IMMUNIZE_EXT_WITH_CUDA) && !defined(__CUDACC__)

void launch_root(const Root& p, GlobalPtr<const double> t, std::int64_t batch, Stream stream);

#else

// t: [batch, s, s], symmetric.
IMMUNIZE_EXT_LAUNCHER void launch_root(
    const Root& p, GlobalPtr<const double> t, std::int64_t batch, Stream stream) {
  if (batch == 0 || p.s == 0) {
    return;
  }
  const std::size_t bytes = static_cast<std::size_t>(root_doubles(p.s)) * sizeof(double);
  simt::allow_dynamic_shared(SIMT_KERNEL(merge_root), bytes);
  simt::launch(
      SIMT_KERNEL(merge_root), solve_grid(batch), dim3(kSolveThreads), bytes, stream, p, t, batch);
}

#endif

}  // namespace immunize_ext::merge
