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
//
// A step waits for the streamers where there are many tiles before it: on an H100 a step took 3.5 to
// 4.3 us at d = 768, and 6.4 to 7.3 at d = 2048. So beyond kWholeTiles the factor is cut into panels
// of columns (of L^T: of rows). A panel is a solve of its own, and what it contributes to all other
// right-hand sides is then subtracted by as many blocks as there are, in a launch between.
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
constexpr int kSubtractThreads = 32 * kStreamers;
constexpr std::int64_t kWholeTiles = 24;  // in one panel: 75 KiB of shared memory
constexpr std::int64_t kPanelTiles = 16;  // at most, of several panels

static_assert(kRowsOfWarp * kSolvers == 16, "a warp's sums are folded by halves, see fold");

// Right-hand sides: element k of number r of a batch is at[k * step + r * stride].
struct RightHandSides {
  GlobalPtr<const double> at;
  std::int64_t step, stride, of_a_batch;

  // Those of `row` and on.
  RightHandSides from(std::int64_t row) const {
    return {at + row * step, step, stride, of_a_batch};
  }
};

struct Problem {
  GlobalPtr<const double> factor;  // [batch, d, d] lower
  RightHandSides rhs;
  GlobalPtr<double> out;      // [batch, s, d], a right-hand side a row
  GlobalPtr<double> scratch;  // [batch, s, d], of several panels alone
  std::int64_t batch, s, d;
};

// A part of the factor on its diagonal. Rows of the factor and of out are d apart.
struct Panel {
  GlobalPtr<const double> factor;
  RightHandSides rhs;
  GlobalPtr<double> out;
  std::int64_t batch, s, side, d;
};

// The rows that a panel leaves: left -= (their part of the panel) y. Rows of all are d apart.
struct Rest {
  GlobalPtr<const double> factor;  // [rows, width], of the transpose [width, rows]
  GlobalPtr<const double> y;       // [batch, s, width]
  RightHandSides rhs;
  GlobalPtr<double> left;  // [batch, s, rows]
  bool first;              // what is left is rhs still
  std::int64_t batch, s, width, rows, d;
};

__host__ __device__ constexpr std::int64_t tiles_of(std::int64_t d) {
  return (d + kTile - 1) / kTile;
}

// Columns of a panel: of one panel for few tiles, else of panels that are alike.
inline std::int64_t panel_width(std::int64_t d) {
  const std::int64_t tiles = tiles_of(d);
  const std::int64_t panels = tiles <= kWholeTiles ? 1 : (tiles + kPanelTiles - 1) / kPanelTiles;
  return kTile * ((tiles + panels - 1) / panels);
}

// Whether a solve needs Problem::scratch.
inline bool has_panels(std::int64_t d) {
  return panel_width(d) < d;
}

inline std::size_t solve_bytes(std::int64_t side) {
  const std::int64_t doubles =
      kSolvers * kTile * tiles_of(side) + 2 * (2 * kTileDoubles + kTile + kSumDoubles);
  return static_cast<std::size_t>(doubles) * sizeof(double);
}

inline std::size_t subtract_bytes(std::int64_t width) {
  return static_cast<std::size_t>(kSolvers * kTile * tiles_of(width) + kSumDoubles) *
         sizeof(double);
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

// Tiles of one panel; step t solves tile t, or of the transpose the t-th from below.
template <bool kTransposed>
struct Walk {
  GlobalPtr<const double> factor;  // [side, side], rows d apart
  SharedPtr<double> y;             // [kSolvers, padded], right-hand sides, then solutions
  std::int64_t side, d;
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
    if (row < w.side && lane < r) {
      const std::int64_t pivot = kTransposed ? row : column;
      staged.diagonal[i] = w.factor[row * w.d + column];
      staged.pivots[i] = w.factor[pivot * (w.d + 1)];
    }
    staged.near[i] = 0;
    if (t > 0 && near_row + r < w.side) {
      staged.near[i] = w.factor[(near_row + r) * w.d + near_column + lane];
    }
  }
  staged.pivot = 1;  // beyond the last row
  if (first + lane < w.side) {
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

// What was solved times a tile of the system: 32 of its rows and `count` of its columns, for the
// kSolvers right-hand sides of y (`padded` apart), by kStreamers warps. Rows of the factor are d
// apart. Of L y: a warp takes four rows of the tile, of which `rows` exist, and lanes take columns;
// count is a multiple of 32. Of L^T y: lanes are rows, all there, and warps share the columns.
template <bool kTransposed>
__device__ __forceinline__ void sum_products(
    SharedPtr<const double> factor,
    std::int64_t d,
    int rows,
    int count,
    SharedPtr<const double> y,
    int padded,
    int warp,
    SharedPtr<double> to) {  // [kStreamers, kSolvers, 32]; of L y the first of them alone
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (!kTransposed) {
    const int row = warp * kRowsOfWarp;
    double sums[16] = {};  // [row, right-hand side]
    SharedPtr<const double> at = factor + (row * d + lane);
    IMMUNIZE_EXT_UNROLL_BY(4)
    for (int column = lane; column < count; column += kTile) {
      double values[kRowsOfWarp];
      IMMUNIZE_EXT_UNROLL
      for (int i = 0; i < kRowsOfWarp; ++i) {
        values[i] = 0;
        if (row + i < rows) {
          values[i] = at[i * d];
        }
      }
      at += kTile;
      IMMUNIZE_EXT_UNROLL
      for (int r = 0; r < kSolvers; ++r) {
        const double solved = y[r * padded + column];
        IMMUNIZE_EXT_UNROLL
        for (int i = 0; i < kRowsOfWarp; ++i) {
          sums[i * kSolvers + r] += values[i] * solved;
        }
      }
    }
    const double sum = fold(sums);
    if (lane % 2 == 0) {
      const int i = lane / 2;
      to[i % kSolvers * kTile + row + i / kSolvers] = sum;
    }
  } else {
    double sums[kSolvers] = {};
    const int begin = warp * kRowsOfWarp;
    SharedPtr<const double> at = factor + (begin * d + lane);
    IMMUNIZE_EXT_UNROLL_BY(4)
    for (int column = begin; column < count; column += kTile) {
      double values[kRowsOfWarp];
      IMMUNIZE_EXT_UNROLL
      for (int i = 0; i < kRowsOfWarp; ++i) {
        values[i] = 0;
        if (column + i < count) {
          values[i] = at[i * d];
        }
      }
      at += kTile * d;
      IMMUNIZE_EXT_UNROLL
      for (int r = 0; r < kSolvers; ++r) {
        IMMUNIZE_EXT_UNROLL
        for (int i = 0; i < kRowsOfWarp; i += 2) {
          const simt::Pack<double, 2> solved = simt::load_pack<2>(y + (r * padded + column + i));
          sums[r] += values[i] * solved.values[0];
          sums[r] += values[i + 1] * solved.values[1];
        }
      }
    }
    IMMUNIZE_EXT_UNROLL
    for (int r = 0; r < kSolvers; ++r) {
      to[(warp * kSolvers + r) * kTile + lane] = sums[r];
    }
  }
}

// Sums over the tiles that were solved two steps before step t and earlier.
template <bool kTransposed>
__device__ __forceinline__ void sum_far(const Walk<kTransposed>& w, int t, const Step& to) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - kSolvers;
  const std::int64_t first = std::int64_t{w.tile(t)} * kTile;
  const std::int64_t solved = kTransposed ? first + 2 * kTile : 0;
  const std::int64_t end = kTransposed ? w.side : first - kTile;
  sum_products<kTransposed>(
      w.factor + (kTransposed ? solved * w.d + first : first * w.d), w.d,
      static_cast<int>(w.side - first), static_cast<int>(end - solved), w.y + solved, w.padded(),
      warp, to.sums);
}

// What sum_products left of one right-hand side and row.
template <bool kTransposed>
__device__ __forceinline__ void take_sums(SharedPtr<const double> sums, double (&parts)[4]) {
  IMMUNIZE_EXT_UNROLL
  for (int i = 0; i < 4; ++i) {
    parts[i] = 0;
  }
  IMMUNIZE_EXT_UNROLL
  for (int i = 0; i < (kTransposed ? kStreamers : 1); ++i) {
    parts[i % 4] += sums[i * kSolvers * kTile];
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
    double parts[4];
    take_sums<kTransposed>(step.sums + (r * kTile + lane), parts);
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

// The kSolvers right-hand sides from `first` on, with zeros beyond the last one and the last row.
__device__ __forceinline__ void load_right_hand_sides(
    const RightHandSides& rhs,
    std::int64_t batch,
    std::int64_t first,
    std::int64_t s,
    std::int64_t rows,
    int padded,
    SharedPtr<double> to) {  // [kSolvers, padded]
  const GlobalPtr<const double> from = rhs.at + batch * rhs.of_a_batch;
  for (int i = static_cast<int>(threadIdx.x); i < kSolvers * padded;
       i += static_cast<int>(blockDim.x)) {
    const std::int64_t r = first + i / padded, k = i % padded;
    double value = 0;
    if (r < s && k < rows) {
      value = from[k * rhs.step + r * rhs.stride];
    }
    to[i] = value;
  }
}

template <bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1) solve_triangular(const Panel p) {
  SIMT_DYNAMIC_SHARED(double, memory);
  const int t = static_cast<int>(threadIdx.x);
  const bool solver = t < 32 * kSolvers;
  const std::int64_t groups = (p.s + kSolvers - 1) / kSolvers;
  for (std::int64_t block = blockIdx.x; block < p.batch * groups; block += gridDim.x) {
    const std::int64_t batch = block / groups, first = block % groups * kSolvers;
    const Walk<kTransposed> w{
        p.factor + batch * p.d * p.d, memory, p.side, p.d, static_cast<int>(tiles_of(p.side))};
    const SharedPtr<double> steps = memory + kSolvers * w.padded();
    load_right_hand_sides(p.rhs, batch, first, p.s, p.side, w.padded(), w.y);
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
      if (r < p.s && k < p.side) {
        const double value = w.y[i];
        out[r * p.d + k] = value;
      }
    }
    __syncthreads();
  }
}

// A block takes a tile of rows and kSolvers right-hand sides.
template <bool kTransposed>
__global__ void __launch_bounds__(kSubtractThreads) subtract_solved(const Rest p) {
  SIMT_DYNAMIC_SHARED(double, memory);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int padded = static_cast<int>(tiles_of(p.width)) * kTile;
  const SharedPtr<double> y = memory, sums = memory + kSolvers * padded;
  const std::int64_t tiles = tiles_of(p.rows), groups = (p.s + kSolvers - 1) / kSolvers;
  for (std::int64_t block = blockIdx.x; block < p.batch * groups * tiles; block += gridDim.x) {
    const std::int64_t batch = block / (groups * tiles);
    const std::int64_t first = block / tiles % groups * kSolvers, row = block % tiles * kTile;
    const RightHandSides solved{p.y, 1, p.d, p.s * p.d};
    load_right_hand_sides(solved, batch, first, p.s, p.width, padded, y);
    __syncthreads();
    sum_products<kTransposed>(
        p.factor + (batch * p.d * p.d + (kTransposed ? row : row * p.d)), p.d,
        static_cast<int>(p.rows - row), static_cast<int>(p.width), y, padded, warp, sums);
    __syncthreads();
    if (warp < kSolvers && first + warp < p.s && row + lane < p.rows) {
      double parts[4];
      take_sums<kTransposed>(sums + (warp * kTile + lane), parts);
      const std::int64_t r = first + warp, k = row + lane;
      const std::int64_t at = batch * p.s * p.d + r * p.d + k;
      double before = 0;
      if (p.first) {
        before = p.rhs.at[batch * p.rhs.of_a_batch + k * p.rhs.step + r * p.rhs.stride];
      } else {
        before = p.left[at];
      }
      p.left[at] = before - ((parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
    __syncthreads();
  }
}

// Solves L Y = F, or with `transposed` L^T Y = F, in panels of `width` columns, a multiple of kTile.
#if defined(IMMUNIZE_EXT_WITH_CUDA) && !defined(__CUDACC__)

void launch_solve_triangular(const Problem& p, bool transposed, std::int64_t width, Stream stream);

#else

IMMUNIZE_EXT_LAUNCHER void launch_solve_triangular(
    const Problem& p, bool transposed, std::int64_t width, Stream stream) {
  const std::int64_t groups = p.batch * ((p.s + kSolvers - 1) / kSolvers);
  if (groups == 0 || p.d == 0) {
    return;
  }
  const auto grid = [](std::int64_t blocks) {
    return dim3(static_cast<unsigned>(std::min<std::int64_t>(blocks, 0x7FFFFFFF)));
  };
  const RightHandSides left{p.scratch, 1, p.d, p.s * p.d};
  const std::int64_t panels = (p.d + width - 1) / width;
  for (std::int64_t i = 0; i < panels; ++i) {
    const std::int64_t begin = (transposed ? panels - 1 - i : i) * width;
    const std::int64_t side = std::min(width, p.d - begin), end = begin + side;
    const RightHandSides& rhs = i == 0 ? p.rhs : left;
    simt::launch(
        transposed ? SIMT_KERNEL(solve_triangular<true>) : SIMT_KERNEL(solve_triangular<false>),
        grid(groups), dim3(kThreads), solve_bytes(side), stream,
        Panel{
            p.factor + begin * (p.d + 1), rhs.from(begin), p.out + begin, p.batch, p.s, side, p.d});
    const std::int64_t first = transposed ? 0 : end, rows = transposed ? begin : p.d - end;
    if (rows > 0) {
      simt::launch(
          transposed ? SIMT_KERNEL(subtract_solved<true>) : SIMT_KERNEL(subtract_solved<false>),
          grid(groups * tiles_of(rows)), dim3(kSubtractThreads), subtract_bytes(side), stream,
          Rest{
              p.factor + (transposed ? begin * p.d : end * p.d + begin), p.out + begin,
              p.rhs.from(first), p.scratch + first, i == 0, p.batch, p.s, side, rows, p.d});
    }
  }
}

#endif

}  // namespace immunize_ext::triangular
