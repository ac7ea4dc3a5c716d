// Triangular solves with one factor and few right-hand sides, in float64: L Y = F or L^T Y = F.
//
// By substitution, tile by tile of 32 x 32: y_i = D_i^-1 (f_i - sum over the tiles solved before),
// D_i the tile on the diagonal. A library spreads the columns of F over the GPU; with a few dozen
// there is nothing to spread, and it launches a solve and a product for every tile. Here a block
// takes four right-hand sides through all tiles in one launch, and reads the factor once, from L2.
//
// The chain of dependent steps is what takes time, so only it runs in order. Of the tiles solved
// before, the last, y_{i-1}, is the only one that step i has to wait for. Warps of two kinds work at
// the same time, with one barrier a step:
//
//   solvers    one for each right-hand side: subtract what the streamers summed and the tile next
//              to the diagonal, then solve the tile on the diagonal, lanes as rows, by shuffles
//   streamers  for the next step: bring its two tiles into shared memory, and sum all the others
//
// A column of the tile on the diagonal comes divided by its pivot, so that a step of the chain is a
// shuffle and a product; y is divided at the end. That is substitution with one more rounding.
#pragma once

#include <algorithm>

#include "portable.cuh"
#include "storage.cuh"

namespace immunize_ext::triangular {

using simt::GlobalPtr;
using simt::SharedPtr;
using simt::Stream;

constexpr int kTile = 32;
constexpr int kSolvers = 4;  // right-hand sides of a block, a warp each
constexpr int kStreamers = 8;
constexpr int kThreads = 32 * (kSolvers + kStreamers);
constexpr int kRowsOfWarp = kTile / kStreamers;  // of a tile
constexpr int kStride = kTile + 1;               // rows and columns of a tile hit all banks
constexpr int kTileDoubles = kTile * kStride;
constexpr int kSumDoubles = kStreamers * kSolvers * kTile;

static_assert(kRowsOfWarp * kSolvers == 16, "a warp's sums are folded by halves, see fold");

struct Problem {
  GlobalPtr<const double> factor;  // [batch, d, d] lower
  GlobalPtr<const double> rhs;     // element k of right-hand side r: rhs[k * step + r * stride]
  GlobalPtr<double> out;           // [batch, s, d], a right-hand side a row
  std::int64_t batch, s, d;
  std::int64_t step, stride, of_a_batch;
};

inline std::int64_t tiles_of(std::int64_t d) {
  return (d + kTile - 1) / kTile;
}

inline std::size_t shared_bytes(std::int64_t d) {
  const std::int64_t doubles =
      kSolvers * kTile * tiles_of(d) + 2 * (2 * kTileDoubles + kTile + kSumDoubles);
  return static_cast<std::size_t>(doubles) * sizeof(double);
}

// Whether a block's shared memory can hold the right-hand sides.
inline bool fits(std::int64_t d, std::size_t limit) {
  return shared_bytes(d) <= limit;
}

// What a step needs of the factor; two in turn.
struct Step {
  SharedPtr<double> diagonal;  // [32, kStride], off the diagonal, divided by the pivots, else 0
  SharedPtr<double> near;      // [32, kStride], beside it: against the tile solved before
  SharedPtr<double> pivots;    // [32]
  SharedPtr<double> sums;      // [kStreamers, kSolvers, 32]
};

__device__ __forceinline__ Step step_at(SharedPtr<double> memory, int which) {
  Step step;
  step.diagonal = memory + which * (2 * kTileDoubles + kTile + kSumDoubles);
  step.near = step.diagonal + kTileDoubles;
  step.pivots = step.near + kTileDoubles;
  step.sums = step.pivots + kTile;
  return step;
}

// values[i], i < 16, summed over the lanes of a warp: lane l gets the sum of i = l / 2.
__device__ __forceinline__ double fold(double (&values)[16]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  IMMUNIZE_EXT_UNROLL
  for (int level = 0; level < 4; ++level) {
    const int half = 8 >> level;
    const bool upper = (lane & 2 * half) != 0;
    IMMUNIZE_EXT_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (i < half) {
        const double sent = upper ? values[i] : values[i + half];
        const double kept = upper ? values[i + half] : values[i];
        values[i] = kept + __shfl_xor_sync(0xFFFFFFFF, sent, 2 * half);
      }
    }
  }
  return values[0] + __shfl_xor_sync(0xFFFFFFFF, values[0], 1);
}

// Tiles of one problem; step t solves tile t, or of the transpose the t-th from below.
template <bool kTransposed>
struct Walk {
  GlobalPtr<const double> factor;  // [d, d]
  SharedPtr<double> y;             // [kSolvers, padded], right-hand sides, then solutions
  std::int64_t d;
  int tiles;

  __device__ __forceinline__ int tile(int step) const {
    return kTransposed ? tiles - 1 - step : step;
  }
  __device__ __forceinline__ int padded() const {
    return tiles * kTile;
  }
};

// Element [row, column] of the tile of the system, which is the factor's or its transpose.
template <bool kTransposed>
__device__ __forceinline__ double element(SharedPtr<const double> tile, int row, int column) {
  return kTransposed ? tile[column * kStride + row] : tile[row * kStride + column];
}

// A streamer's part of the two tiles of a step, on its way from memory to shared memory: rows
// kRowsOfWarp w and on of warp w, a column a lane.
struct Staged {
  double diagonal[kRowsOfWarp], pivots[kRowsOfWarp], near[kRowsOfWarp];
  double pivot;  // of row `lane`
};

template <bool kTransposed>
__device__ __forceinline__ Staged load_tiles(const Walk<kTransposed>& w, int t) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 - kSolvers;
  const std::int64_t first = std::int64_t{w.tile(t)} * kTile;
  const std::int64_t before = t > 0 ? std::int64_t{w.tile(t - 1)} * kTile : 0;
  const std::int64_t near_row = kTransposed ? before : first;
  const std::int64_t near_column = kTransposed ? first : before;
  Staged staged;
  IMMUNIZE_EXT_UNROLL
  for (int i = 0; i < kRowsOfWarp; ++i) {
    const int r = warp * kRowsOfWarp + i;
    const std::int64_t row = first + r, column = first + lane;
    staged.diagonal[i] = 0;
    staged.pivots[i] = 1;
    if (row < w.d && lane < r) {
      const std::int64_t pivot = kTransposed ? row : column;
      staged.diagonal[i] = w.factor[row * w.d + column];
      staged.pivots[i] = w.factor[pivot * (w.d + 1)];
    }
    staged.near[i] = 0;
    if (t > 0 && near_row + r < w.d) {
      staged.near[i] = w.factor[(near_row + r) * w.d + near_column + lane];
    }
  }
  staged.pivot = 1;  // beyond the last row
  if (first + lane < w.d) {
    staged.pivot = w.factor[(first + lane) * (w.d + 1)];
  }
  return staged;
}

__device__ __forceinline__ void store_tiles(const Staged& staged, const Step& to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 - kSolvers;
  IMMUNIZE_EXT_UNROLL
  for (int i = 0; i < kRowsOfWarp; ++i) {
    const int at = (warp * kRowsOfWarp + i) * kStride + lane;
    to.diagonal[at] = staged.diagonal[i] / staged.pivots[i];
    to.near[at] = staged.near[i];
  }
  if (warp == 0) {
    to.pivots[lane] = staged.pivot;
  }
}

// Sums over the tiles that were solved two steps before and earlier. Of L y: a warp takes four rows
// of the tile and lanes take columns. Of L^T y: lanes are rows, and warps share the columns.
template <bool kTransposed>
__device__ __forceinline__ void sum_far(const Walk<kTransposed>& w, int t, const Step& to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 - kSolvers;
  const std::int64_t first = std::int64_t{w.tile(t)} * kTile;
  const SharedPtr<const double> y = w.y;
  if (!kTransposed) {
    const int row = warp * kRowsOfWarp;
    const int end = t > 0 ? (t - 1) * kTile : 0;
    double sums[16] = {};  // [row, right-hand side]
    SharedPtr<const double> at = w.factor + ((first + row) * w.d + lane);
    IMMUNIZE_EXT_UNROLL_BY(4)
    for (int column = lane; column < end; column += kTile) {
      double values[kRowsOfWarp];
      IMMUNIZE_EXT_UNROLL
      for (int i = 0; i < kRowsOfWarp; ++i) {
        values[i] = 0;
        if (first + row + i < w.d) {
          values[i] = at[i * w.d];
        }
      }
      at += kTile;
      IMMUNIZE_EXT_UNROLL
      for (int r = 0; r < kSolvers; ++r) {
        const double solved = y[r * w.padded() + column];
        IMMUNIZE_EXT_UNROLL
        for (int i = 0; i < kRowsOfWarp; ++i) {
          sums[i * kSolvers + r] += values[i] * solved;
        }
      }
    }
    const double sum = fold(sums);
    if (lane % 2 == 0) {
      const int i = lane / 2;
      to.sums[i % kSolvers * kTile + row + i / kSolvers] = sum;
    }
  } else {
    double sums[kSolvers] = {};
    const std::int64_t begin = first + 2 * kTile + warp * kRowsOfWarp;
    SharedPtr<const double> at = w.factor + (begin * w.d + first + lane);
    IMMUNIZE_EXT_UNROLL_BY(4)
    for (std::int64_t row = begin; row < w.d; row += kTile) {
      double values[kRowsOfWarp];
      IMMUNIZE_EXT_UNROLL
      for (int i = 0; i < kRowsOfWarp; ++i) {
        values[i] = 0;
        if (row + i < w.d) {
          values[i] = at[i * w.d];
        }
      }
      at += kTile * w.d;
      IMMUNIZE_EXT_UNROLL
      for (int r = 0; r < kSolvers; ++r) {
        IMMUNIZE_EXT_UNROLL
        for (int i = 0; i < kRowsOfWarp; i += 2) {
          const simt::Pack<double, 2> solved =
              simt::load_pack<2>(y + (r * w.padded() + static_cast<int>(row) + i));
          sums[r] += values[i] * solved.values[0];
          sums[r] += values[i + 1] * solved.values[1];
        }
      }
    }
    IMMUNIZE_EXT_UNROLL
    for (int r = 0; r < kSolvers; ++r) {
      to.sums[(warp * kSolvers + r) * kTile + lane] = sums[r];
    }
  }
}

// A tile of one right-hand side, by one warp; lanes are rows.
template <bool kTransposed>
__device__ __forceinline__ void solve_tile(const Walk<kTransposed>& w, int t, const Step& step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int r = static_cast<int>(threadIdx.x) / 32;
  const SharedPtr<double> y = w.y + (r * w.padded() + w.tile(t) * kTile);
  double left = y[lane];
  if (t > 0) {
    double parts[4] = {};
    IMMUNIZE_EXT_UNROLL
    for (int i = 0; i < (kTransposed ? kStreamers : 1); ++i) {
      parts[i % 4] += step.sums[(i * kSolvers + r) * kTile + lane];
    }
    const SharedPtr<const double> before = w.y + (r * w.padded() + w.tile(t - 1) * kTile);
    IMMUNIZE_EXT_UNROLL_BY(8)
    for (int k = 0; k < kTile; k += 4) {
      IMMUNIZE_EXT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const double solved = before[k + i];
        parts[i] += element<kTransposed>(step.near, lane, k + i) * solved;
      }
    }
    left -= (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
  IMMUNIZE_EXT_UNROLL_BY(8)
  for (int i = 0; i < kTile; ++i) {
    const int k = kTransposed ? kTile - 1 - i : i;
    left -= element<kTransposed>(step.diagonal, lane, k) * __shfl_sync(0xFFFFFFFF, left, k);
  }
  const double pivot = step.pivots[lane];
  y[lane] = left / pivot;
}

template <bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1) solve_triangular(const Problem p) {
  SIMT_DYNAMIC_SHARED(double, memory);
  const int t = static_cast<int>(threadIdx.x);
  const bool solver = t < 32 * kSolvers;
  const std::int64_t groups = (p.s + kSolvers - 1) / kSolvers;
  for (std::int64_t block = blockIdx.x; block < p.batch * groups; block += gridDim.x) {
    const std::int64_t batch = block / groups, first = block % groups * kSolvers;
    Walk<kTransposed> w{p.factor + batch * p.d * p.d, memory, p.d, 0};
    w.tiles = static_cast<int>((p.d + kTile - 1) / kTile);
    const SharedPtr<double> steps = memory + kSolvers * w.padded();
    const GlobalPtr<const double> rhs = p.rhs + batch * p.of_a_batch;
    for (int i = t; i < kSolvers * w.padded(); i += kThreads) {
      const std::int64_t r = first + i / w.padded(), k = i % w.padded();
      double value = 0;
      if (r < p.s && k < p.d) {
        value = rhs[k * p.step + r * p.stride];
      }
      w.y[i] = value;
    }
    if (!solver) {
      store_tiles(load_tiles(w, 0), step_at(steps, 0));
    }
    __syncthreads();
    for (int step = 0; step < w.tiles; ++step) {
      if (solver) {
        solve_tile(w, step, step_at(steps, step % 2));
      } else if (step + 1 < w.tiles) {
        const Step next = step_at(steps, (step + 1) % 2);
        const Staged staged = load_tiles(w, step + 1);  // on its way during the sums
        sum_far(w, step + 1, next);
        store_tiles(staged, next);
      }
      __syncthreads();
    }
    const GlobalPtr<double> out = p.out + batch * p.s * p.d;
    for (int i = t; i < kSolvers * w.padded(); i += kThreads) {
      const std::int64_t r = first + i / w.padded(), k = i % w.padded();
      if (r < p.s && k < p.d) {
        const double value = w.y[i];
        out[r * p.d + k] = value;
      }
    }
    __syncthreads();
  }
}

// Solves L Y = F, or with `transposed` L^T Y = F. d must fit, see fits.
#if defined(IMMUNIZE_EXT_WITH_CUDA) && !defined(__CUDACC__)

void launch_solve_triangular(const Problem& p, bool transposed, Stream stream);

#else

IMMUNIZE_EXT_LAUNCHER void launch_solve_triangular(
    const Problem& p, bool transposed, Stream stream) {
  const std::int64_t blocks = p.batch * ((p.s + kSolvers - 1) / kSolvers);
  if (blocks == 0 || p.d == 0) {
    return;
  }
  simt::launch(
      transposed ? SIMT_KERNEL(solve_triangular<true>) : SIMT_KERNEL(solve_triangular<false>),
      dim3(static_cast<unsigned>(std::min<std::int64_t>(blocks, 0x7FFFFFFF))), dim3(kThreads),
      shared_bytes(p.d), stream, p);
}

#endif

}  // namespace immunize_ext::triangular
