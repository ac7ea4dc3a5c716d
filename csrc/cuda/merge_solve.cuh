// Regularised key/value merge on a GPU, the part shared by all layers, in float64.
//
//   A = Q^-1 C^T,   T = C A + diag(1 / mu),   E the (generalised) inverse of T,   I - E T
//
// One block does one problem of the batch, and nothing waits for the host. merge_invert does what
// cuSOLVER lacks: from T on, by a Cholesky factorisation with pivots that finds repeated rows of C.
// merge_solve_small does everything for d <= 128, where Q's factor L fits into shared memory and
// library calls would cost more than the work.
#pragma once

#include <algorithm>

#include "portable.cuh"
#include "storage.cuh"

namespace immunize_ext::merge {

using simt::GlobalPtr;
using simt::SharedPtr;
using simt::Stream;

constexpr int kSolveThreads = 256;
constexpr int kSmallSide = 128;  // largest d of merge_solve_small: 4 numbers a lane

// Results for a batch; factor and t are scratch. The factor's column k lies at factor[k, :].
struct Inverse {
  GlobalPtr<double> e, defect;   // [batch, s, s]
  GlobalPtr<double> factor;      // [batch, s, s], T = D F F^T D, first `rank` columns of F
  GlobalPtr<double> scale;       // [batch, s], the diagonal of D: square roots of that of T
  GlobalPtr<std::int64_t> rank;  // [batch]
  std::int64_t s;
  double rank_rtol;
};

// Shared memory of invert, in doubles.
constexpr std::int64_t invert_doubles(std::int64_t s) {
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

// E and I - E T of one T (s x s) by all threads of a block. T is scaled to unit diagonal, so a
// pivot is the squared sine of the angle between a row and the span of those already kept, and the
// tolerance has no units. Of equal rows the first is kept. With S selecting the kept rows,
//   E = S^T (S T S^T)^-1 S = S^T (D L L^T D)^-1 S,   L the kept rows of F, lower triangular.
__device__ __forceinline__ void invert(
    const Inverse& p, GlobalPtr<const double> t, std::int64_t batch, SharedPtr<double> memory) {
  const int s = static_cast<int>(p.s);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t matrix = batch * p.s * p.s;
  const GlobalPtr<double> factor = p.factor + matrix;
  const GlobalPtr<double> e = p.e + matrix;
  const GlobalPtr<double> defect = p.defect + matrix;
  const SharedPtr<double> pivot = memory;            // below 0: the row is kept
  const SharedPtr<double> unscale = pivot + s;       // 1 / D
  const SharedPtr<double> reciprocal = unscale + s;  // of the diagonal of L
  const SharedPtr<int> kept = simt::pointer_cast<int>(reciprocal + s);

  for (int j = thread; j < s; j += kSolveThreads) {
    const double diagonal = t[std::int64_t{j} * s + j];
    // A zero row of C constrains nothing.
    const double root = diagonal > 0 ? sqrt(diagonal) : 1.0;
    unscale[j] = 1.0 / root;
    p.scale[batch * p.s + j] = root;
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
    const double root = sqrt(value), over_root = 1.0 / root;
    const double best_unscale = unscale[best];
    for (int j = thread; j < s; j += kSolveThreads) {
      const double old = pivot[j];
      double entry = 0;  // of a row that is kept already
      if (j == best) {
        entry = root;
        pivot[j] = -1.0;
        kept[rank] = j;
        reciprocal[rank] = over_root;
      } else if (old >= 0) {
        const double row_unscale = unscale[j];
        entry = t[std::int64_t{j} * s + best];
        entry *= row_unscale * best_unscale;
        for (int k = 0; k < rank; ++k) {
          const double mine = factor[std::int64_t{k} * s + j];
          const double other = factor[std::int64_t{k} * s + best];
          entry -= mine * other;
        }
        entry *= over_root;
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

  // X = L^-1, a column a thread, in the place of the defect, row by row.
  for (int column = thread; column < rank; column += kSolveThreads) {
    for (int i = column; i < rank; ++i) {
      const int row = kept[i];
      double entry = i == column ? 1.0 : 0.0;
      for (int k = column; k < i; ++k) {
        const double left = factor[std::int64_t{k} * s + row];
        const double right = defect[std::int64_t{k} * s + column];
        entry -= left * right;
      }
      const double over_diagonal = reciprocal[i];
      defect[std::int64_t{i} * s + column] = entry * over_diagonal;
    }
  }
  for (std::int64_t i = thread; i < std::int64_t{s} * s; i += kSolveThreads) {
    e[i] = 0;
  }
  __syncthreads();
  // E = D^-1 X^T X D^-1 in the kept rows and columns.
  for (std::int64_t i = thread; i < std::int64_t{rank} * rank; i += kSolveThreads) {
    const int a = static_cast<int>(i / rank), b = static_cast<int>(i % rank);
    double sum = 0;
    for (int k = max(a, b); k < rank; ++k) {
      const double left = defect[std::int64_t{k} * s + a];
      const double right = defect[std::int64_t{k} * s + b];
      sum += left * right;
    }
    const int row = kept[a], column = kept[b];
    const double row_unscale = unscale[row], column_unscale = unscale[column];
    e[std::int64_t{row} * s + column] = sum * (row_unscale * column_unscale);
  }
  __syncthreads();
  for (std::int64_t i = thread; i < std::int64_t{s} * s; i += kSolveThreads) {
    const std::int64_t row = i / s, column = i % s;
    double value = 0;
    const double column_pivot = pivot[column];
    // Exact zeros in the kept columns, which hold nothing but rounding.
    if (rank < s && column_pivot >= 0) {
      value = row == column ? 1.0 : 0.0;
      for (int k = 0; k < s; ++k) {
        const double left = e[row * s + k];
        const double right = t[std::int64_t{k} * s + column];
        value -= left * right;
      }
    }
    defect[i] = value;
  }
  __syncthreads();
}

static __global__ void __launch_bounds__(kSolveThreads, 1)
    merge_invert(const Inverse p, GlobalPtr<const double> t, std::int64_t batch) {
  SIMT_DYNAMIC_SHARED(double, memory);
  for (std::int64_t i = blockIdx.x; i < batch; i += gridDim.x) {
    invert(p, t + i * p.s * p.s, i, memory);
  }
}

struct SmallProblem {
  GlobalPtr<const double> chol;              // [batch, d, d], L, lower
  GlobalPtr<const double> c;                 // [batch, s, d]
  GlobalPtr<const double> inverse_hardness;  // [batch, s]
  GlobalPtr<double> a;                       // [batch, d, s]
  GlobalPtr<double> z;                       // [batch, s, d], scratch: (L^-1 C^T)^T
  GlobalPtr<double> t;                       // [batch, s, s], scratch
  std::int64_t batch, d;
};

// Row stride of L in shared memory: odd, so that the lanes of a warp reading a column meet
// different banks.
__host__ __device__ constexpr std::int64_t factor_stride(std::int64_t d) {
  return d | 1;
}

static __global__ void __launch_bounds__(kSolveThreads, 1)
    merge_solve_small(const SmallProblem p, const Inverse inverse) {
  constexpr int kSlots = kSmallSide / 32;
  SIMT_DYNAMIC_SHARED(double, memory);
  const int d = static_cast<int>(p.d), s = static_cast<int>(inverse.s);
  const int stride = static_cast<int>(factor_stride(d));
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32, warp = thread / 32;
  const SharedPtr<double> factor = memory;  // reciprocals on the diagonal
  const SharedPtr<double> rest = memory + std::int64_t{d} * stride;
  for (std::int64_t batch = blockIdx.x; batch < p.batch; batch += gridDim.x) {
    for (int i = thread; i < d * d; i += kSolveThreads) {
      const double value = p.chol[batch * d * d + i];
      factor[i / d * stride + i % d] = i / d == i % d ? 1.0 / value : value;
    }
    __syncthreads();
    // A warp solves for one token; lane l has the entries l, l + 32, ...
    for (int j = warp; j < s; j += kSolveThreads / 32) {
      const std::int64_t token = (batch * s + j) * d;
      double x[kSlots];
      IMMUNIZE_EXT_UNROLL
      for (int m = 0; m < kSlots; ++m) {
        x[m] = 0;
        if (lane + 32 * m < d) {
          x[m] = p.c[token + lane + 32 * m];
        }
      }
      // L z = c, column by column.
      IMMUNIZE_EXT_UNROLL
      for (int m = 0; m < kSlots; ++m) {
        for (int i = 32 * m; i < min(d, 32 * (m + 1)); ++i) {
          const double reciprocal = factor[i * stride + i];
          const double entry = __shfl_sync(0xFFFFFFFF, x[m], i % 32) * reciprocal;
          if (lane == i % 32) {
            x[m] = entry;
          }
          IMMUNIZE_EXT_UNROLL
          for (int u = m; u < kSlots; ++u) {
            const int k = lane + 32 * u;
            if (k > i && k < d) {
              const double left = factor[k * stride + i];
              x[u] -= left * entry;
            }
          }
        }
      }
      IMMUNIZE_EXT_UNROLL
      for (int m = 0; m < kSlots; ++m) {
        if (lane + 32 * m < d) {
          p.z[token + lane + 32 * m] = x[m];
        }
      }
      // L^T a = z.
      IMMUNIZE_EXT_UNROLL
      for (int m = kSlots - 1; m >= 0; --m) {
        for (int i = min(d, 32 * (m + 1)) - 1; i >= 32 * m; --i) {
          const double reciprocal = factor[i * stride + i];
          const double entry = __shfl_sync(0xFFFFFFFF, x[m], i % 32) * reciprocal;
          if (lane == i % 32) {
            x[m] = entry;
          }
          IMMUNIZE_EXT_UNROLL
          for (int u = 0; u <= m; ++u) {
            const int k = lane + 32 * u;
            if (k < i) {
              const double left = factor[i * stride + k];
              x[u] -= left * entry;
            }
          }
        }
      }
      IMMUNIZE_EXT_UNROLL
      for (int m = 0; m < kSlots; ++m) {
        const int k = lane + 32 * m;
        if (k < d) {
          p.a[(batch * d + k) * s + j] = x[m];
        }
      }
    }
    __syncthreads();
    // T = Z^T Z: positive semidefinite whatever the rounding.
    const GlobalPtr<double> t = p.t + batch * s * s;
    for (int i = thread; i < s * s; i += kSolveThreads) {
      const std::int64_t left = (batch * s + i / s) * d, right = (batch * s + i % s) * d;
      double sum = 0;
      for (int k = 0; k < d; ++k) {
        const double one = p.z[left + k], other = p.z[right + k];
        sum += one * other;
      }
      if (i / s == i % s) {
        const double soft = p.inverse_hardness[batch * s + i / s];
        sum += soft;
      }
      t[i] = sum;
    }
    __syncthreads();
    invert(inverse, t, batch, rest);
  }
}

// A block a problem, as many as may wait at a time.
inline dim3 solve_grid(std::int64_t batch) {
  return dim3(static_cast<unsigned>(std::min<std::int64_t>(batch, 0x7FFFFFFF)));
}

inline std::size_t small_bytes(std::int64_t d, std::int64_t s) {
  return static_cast<std::size_t>(d * factor_stride(d) + invert_doubles(s)) * sizeof(double);
}

// Static shared memory of find_pivot, which counts as well.
constexpr std::size_t kPivotBytes = kSolveThreads / 32 * (sizeof(double) + sizeof(int));

// Whether merge_solve_small takes a problem: L fits, and T is small enough for one block.
inline bool is_small(std::int64_t d, std::int64_t s, Stream stream) {
  return d <= kSmallSide && s <= kSmallSide &&
         small_bytes(d, s) + kPivotBytes <= simt::shared_limit(stream);
}

#if defined(IMMUNIZE_EXT_WITH_CUDA) && !defined(__CUDACC__)

void launch_solve_small(const SmallProblem& p, const Inverse& inverse, Stream stream);
void launch_invert(const Inverse& p, GlobalPtr<const double> t, std::int64_t batch, Stream stream);

#else

IMMUNIZE_EXT_LAUNCHER void launch_solve_small(
    const SmallProblem& p, const Inverse& inverse, Stream stream) {
  if (p.batch == 0 || inverse.s == 0) {
    return;
  }
  const std::size_t bytes = small_bytes(p.d, inverse.s);
  simt::allow_dynamic_shared(SIMT_KERNEL(merge_solve_small), bytes);
  simt::launch(
      SIMT_KERNEL(merge_solve_small), solve_grid(p.batch), dim3(kSolveThreads), bytes, stream, p,
      inverse);
}

// t: [batch, s, s], symmetric.
IMMUNIZE_EXT_LAUNCHER void launch_invert(
    const Inverse& p, GlobalPtr<const double> t, std::int64_t batch, Stream stream) {
  if (batch == 0 || p.s == 0) {
    return;
  }
  const std::size_t bytes = static_cast<std::size_t>(invert_doubles(p.s)) * sizeof(double);
  simt::allow_dynamic_shared(SIMT_KERNEL(merge_invert), bytes);
  simt::launch(
      SIMT_KERNEL(merge_invert), solve_grid(batch), dim3(kSolveThreads), bytes, stream, p, t,
      batch);
}

#endif

}  // namespace immunize_ext::merge
