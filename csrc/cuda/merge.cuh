// Regularised key/value merge on a GPU, the part per layer; merge_solve.cuh has the shared part.
//
// Forward, csrc/cpu/merge.cpp has the derivation:
//
//   R_l = [ (W_1 - W0) C_1^T | ... | (W_N - W0) C_N^T ]   or   V_l - W0 C^T,     W_l = W0_l + R_l B
//
// Backward, for G_l = dL/dW_l:
//
//   dR_l = G_l B^T          dW0_l = G_l - dR_l C      dW_n,l = dR_n,l C_n      dV_l = dR_l
//   dB = sum_l R_l^T G_l    dC_n = sum_l dR_n,l^T (W_n,l - W0_l)   or   dC = -sum_l dR_l^T W0_l
//
// Both directions have the same two steps, done by one block for 16 rows of one layer:
//
//   project   coefficients = X Y^T    X = W_n - W0, W0 or G; Y = C or B; 16 x tokens, in shared
//   combine   out = K + sign coefficients Z     K = W0 or G; Z = B or C
//
// The rows of K are kept in shared memory between the steps, in the weights' type, so every row of
// W0, W_n and G is read once, every row of the results written once, and R, dR and the update make
// no trip through memory. Only where that would leave a multiprocessor too few blocks (in float32 on
// an H100 less than three, d beyond 896) is K read a second time: a block alone waits at its
// barriers, and one in its products leaves the memory idle, which costs more than another read.
// All layers go in one launch: a block finds its layer in a table.
//
// project takes two tiles of 16 tokens in one pass over the columns, so that for two concepts W0 is
// read once. It splits the columns of a chunk among the warps and lets each lane hold 2 rows x 2 to
// 4 tokens; the warps' sums are then added in a fixed order. In combine every thread owns 2 columns
// of all 16 rows, so Z is read once by a block, straight into registers: no other thread wants it.
//
// What a block takes in float32, with t tokens a lane (2 to 4): a 16-byte load from shared memory
// costs a warp 4 wavefronts whatever its lanes share, one where all read the same.
//
//   products        16 d s in each step, d s instructions of a warp for both
//   project reads   2 + t loads for 8 t products: d s (2 + t) / (4 t) wavefronts
//   chunks written  d for a tile of tokens
//   combine reads   a coefficient for all lanes: d s / 16
//
// At d = 768, two concepts of 12 tokens: 4600 cycles of products (4 instructions a cycle), 10400 of
// shared memory (one wavefront), and 12400 of DRAM for a 132nd of 3.35 TB/s at 1.6 GHz. Three
// blocks overlap them. 4 rows x t tokens a lane would read 0.29 d s instead of 0.42, with 16 more
// registers for the sums, those of the third block. What is left is latency, so nothing waits for
// DRAM that can be known before: chunks are asked for two ahead, the rows that combine reads again
// a product ahead (simt::prefetch, into L2, which holds no register), and it loads rows before it
// stores any.
//
// The sums over all rows, dB and dC, read G (or W_n and W0) once more, in a kernel of their own
// that runs only if they are asked for. Keeping them in the row kernel would cost a read and write
// of s x d partial sums for every 16 rows, more than reading 16 rows again. Row groups are summed
// in registers, added to a block's partial sum in float64, and the partial sums in fixed order: no
// atomics, the same bits every time, whatever the GPU.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../merge_status.h"
#include "storage.cuh"

namespace immunize_ext::merge {

using simt::GlobalPtr;
using simt::SharedPtr;
using simt::Stream;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;    // rows of a block
constexpr int kTileTokens = 16;  // tokens that project does at a time
constexpr int kChunk = 128;      // columns that project does at a time
constexpr int kPerThread = kTileRows * kChunk / kThreads;
constexpr int kPairColumns = 2 * kThreads;  // columns that combine does at a time
constexpr int kGroupRows = 256;             // rows that are summed in registers, for dB and dC
constexpr std::int64_t kSumBlocks = 512;    // blocks over which the sums are spread, about

static_assert(kTileRows == kTileTokens, "rows and tokens share the layout of a chunk");
static_assert(kTileRows * kTileTokens == kThreads, "a thread for each coefficient of a tile");
static_assert(kWarps * kThreads <= kTileRows * kChunk, "the warps' sums fit into the chunk");

// Elements in a 16-byte load.
template <typename T>
constexpr int kPack = static_cast<int>(16 / sizeof(T));

// Row stride of a chunk in shared memory: the pad puts the 8 rows that a warp reads at the same
// time into different banks.
template <typename A>
constexpr int kStride = kChunk + kPack<A>;

// --- Tables --------------------------------------------------------------------------------------

template <typename T>
struct Weight {
  GlobalPtr<const T> data;  // [*, o_l, d]
};

// One layer of the forward pass.
template <typename T>
struct ApplyLayer {
  GlobalPtr<const T> base;                // [*, o_l, d]
  GlobalPtr<const Accumulate<T>> values;  // [*, o_l, s], null for concept weights
  GlobalPtr<T> merged;                    // [*, o_l, d]
  GlobalPtr<Accumulate<T>> residual;      // [*, o_l, s]
  std::int64_t rows;                      // o_l
};

// One layer of the backward pass; results that are not wanted are null.
template <typename T>
struct BackwardLayer {
  GlobalPtr<const T> grad;                     // [*, o_l, d]
  GlobalPtr<T> grad_base;                      // [*, o_l, d]
  GlobalPtr<Accumulate<T>> grad_coefficients;  // [*, o_l, s], dR
  std::int64_t rows;
};
template <typename T>
struct Gradient {
  GlobalPtr<T> data;  // [*, o_l, d]
};

// One layer of a sum over rows.
template <typename T>
struct SumLayer {
  GlobalPtr<const Accumulate<T>> coefficients;  // [*, o_l, s], R or dR
  GlobalPtr<const T> plain;                     // [*, o_l, d], G or W0
  std::int64_t rows;
};
// Up to 16 neighbouring tokens of one concept.
struct TokenTile {
  std::int64_t first, count, concept_index;
};

// Tables on their way to the GPU, as 8-byte words.
class HostTables {
 public:
  // Where the table starts, in words.
  template <typename V>
  std::int64_t add(const std::vector<V>& table) {
    static_assert(sizeof(V) % sizeof(std::uint64_t) == 0 && std::is_trivially_copyable_v<V>);
    const std::size_t start = words_.size();
    words_.resize(start + table.size() * sizeof(V) / sizeof(std::uint64_t));
    if (!table.empty()) {
      std::memcpy(words_.data() + start, table.data(), table.size() * sizeof(V));
    }
    return static_cast<std::int64_t>(start);
  }
  const std::vector<std::uint64_t>& words() const {
    return words_;
  }

 private:
  std::vector<std::uint64_t> words_;
};

// Kernel arguments have 4 KiB at most on older drivers.
constexpr int kUploadWords = 448;
struct UploadChunk {
  std::uint64_t words[kUploadWords];
};

static __global__ void __launch_bounds__(kUploadWords)
    upload_words(GlobalPtr<std::uint64_t> to, int count, const UploadChunk chunk) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) {
    to[i] = chunk.words[i];
  }
}

// Tables travel as kernel arguments: no pinned buffer that has to outlive the call, no wait, and a
// CUDA graph that captures the launch holds its own copy.
inline void upload(const HostTables& tables, GlobalPtr<std::uint64_t> to, Stream stream) {
  const std::vector<std::uint64_t>& words = tables.words();
  for (std::size_t start = 0; start < words.size(); start += kUploadWords) {
    const std::size_t count = std::min<std::size_t>(kUploadWords, words.size() - start);
    UploadChunk chunk{};
    std::memcpy(chunk.words, words.data() + start, count * sizeof(std::uint64_t));
    simt::launch(
        SIMT_KERNEL(upload_words), dim3(1), dim3(kUploadWords), 0, stream,
        to + static_cast<std::int64_t>(start), static_cast<int>(count), chunk);
  }
}

// starts[l] <= i < starts[l + 1] for the l returned; starts has count + 1 entries.
__device__ __forceinline__ int find_interval(
    GlobalPtr<const std::int64_t> starts, int count, std::int64_t i) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const std::int64_t start = starts[middle];
    if (start <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// starts of units of `unit` rows over all layers.
template <typename Layer>
std::vector<std::int64_t> starts_of(const std::vector<Layer>& layers, std::int64_t unit) {
  std::vector<std::int64_t> starts{0};
  for (const Layer& layer : layers) {
    starts.push_back(starts.back() + (layer.rows + unit - 1) / unit);
  }
  return starts;
}

// --- Loads ---------------------------------------------------------------------------------------

// Which elements of a chunk, 16 x 128, a thread handles: by packs of T, so that neighbouring
// threads read neighbouring packs, else one by one. They are in one column (or pack of columns),
// kStep rows apart.
template <typename T, bool kPacks>
struct Place {
  static constexpr int kWidth = kPacks ? kPack<T> : 1;
  static constexpr int kStep = kThreads * kWidth / kChunk;
  const int column = static_cast<int>(threadIdx.x) * kWidth % kChunk;
  const int row = static_cast<int>(threadIdx.x) * kWidth / kChunk;
};

// Elements in a line of L2, 128 bytes.
template <typename T>
constexpr int kLine = static_cast<int>(128 / sizeof(T));

// Elements [16 rows, 128 columns from `column`] of a row-major matrix, zero outside of it. With
// packs, rows are aligned and d is a multiple of a pack.
//
// Registers hold one chunk ahead, which is on its way for half a product: less than DRAM takes. So
// with kAsk the chunk after it is asked for, too, by a thread a line; its load then waits for L2.
template <typename T, bool kPacks, bool kAsk = false>
__device__ __forceinline__ void load_chunk(
    GlobalPtr<const T> from,
    int rows,
    std::int64_t d,
    int column,
    Accumulate<T> (&values)[kPerThread]) {
  using P = Place<T, kPacks>;
  const P place;
  const int k = column + place.column;
  // Rows that do not exist count as far away, so that one comparison serves rows and columns.
  const int left = k < d ? rows - place.row : 0;
  const bool asks = place.column % kLine<T> == 0 && k + kChunk < d;
  SharedPtr<const T> at = from + (place.row * d + k);
  IMMUNIZE_EXT_UNROLL
  for (int i = 0; i < kPerThread / P::kWidth; ++i) {
    if (i * P::kStep < left) {
      const simt::Pack<T, P::kWidth> pack = simt::load_pack<P::kWidth>(at);
      IMMUNIZE_EXT_UNROLL
      for (int v = 0; v < P::kWidth; ++v) {
        values[i * P::kWidth + v] = Storage<T>::widen(pack.values[v]);
      }
      if (kAsk && asks) {
        simt::prefetch(at + kChunk);
      }
    } else {
      IMMUNIZE_EXT_UNROLL
      for (int v = 0; v < P::kWidth; ++v) {
        values[i * P::kWidth + v] = Accumulate<T>(0);
      }
    }
    at += P::kStep * d;
  }
}

// Asks for rows of a block to be brought into L2: the columns that combine does at a time, from
// `column` on. A product later they are read from there.
template <typename T>
__device__ __forceinline__ void prefetch_rows(
    GlobalPtr<const T> from, int rows, std::int64_t d, int column) {
  constexpr int kLines = kPairColumns / kLine<T>;
  IMMUNIZE_EXT_UNROLL
  for (int i = 0; i < kTileRows * kLines; i += kThreads) {
    const int line = i + static_cast<int>(threadIdx.x);
    const int k = column + line % kLines * kLine<T>;
    if (line / kLines < rows && k < d) {
      simt::prefetch(from + (line / kLines * d + k));
    }
  }
}

// A thread's elements to or from a matrix in shared memory with rows of `stride`. Its elements may
// be as wide as those in memory or as those to compute with.
template <typename T, bool kPacks, bool kStore, typename Element>
__device__ __forceinline__ void move_shared(
    SharedPtr<Element> matrix, int stride, Accumulate<T> (&values)[kPerThread]) {
  using P = Place<T, kPacks>;
  // Less than P's, where weights of 2 bytes are kept in 4.
  constexpr int kWidth = kPacks ? kPack<Element> : 1;
  const P place;
  IMMUNIZE_EXT_UNROLL
  for (int i = 0; i < kPerThread; i += kWidth) {
    const int row = place.row + i / P::kWidth * P::kStep;
    const SharedPtr<Element> at = matrix + (row * stride + place.column + i % P::kWidth);
    simt::Pack<Element, kWidth> pack;
    if (kStore) {
      IMMUNIZE_EXT_UNROLL
      for (int v = 0; v < kWidth; ++v) {
        pack.values[v] = Storage<Element>::narrow(values[i + v]);
      }
      simt::store_pack(at, pack);
    } else {
      pack = simt::load_pack<kWidth>(at);
      IMMUNIZE_EXT_UNROLL
      for (int v = 0; v < kWidth; ++v) {
        values[i + v] = Storage<Element>::widen(pack.values[v]);
      }
    }
  }
}

// Elements k and k + 1 of a row, from `at` on; the second may lie behind the row's end.
template <typename T, bool kPacks>
__device__ __forceinline__ void load_pair(
    SharedPtr<const T> at, bool has_second, Accumulate<T> (&pair)[2]) {
  if (kPacks) {
    const simt::Pack<T, 2> pack = simt::load_pack<2>(at);
    pair[0] = Storage<T>::widen(pack.values[0]);
    pair[1] = Storage<T>::widen(pack.values[1]);
  } else {
    const T first = at[0];
    pair[0] = Storage<T>::widen(first);
    pair[1] = Accumulate<T>(0);
    if (has_second) {
      const T second = at[1];
      pair[1] = Storage<T>::widen(second);
    }
  }
}

template <typename T, bool kPacks>
__device__ __forceinline__ void store_pair(
    SharedPtr<T> at, bool has_second, Accumulate<T> first, Accumulate<T> second) {
  if (kPacks) {
    simt::Pack<T, 2> pack;
    pack.values[0] = Storage<T>::narrow(first);
    pack.values[1] = Storage<T>::narrow(second);
    simt::store_pack(at, pack);
  } else {
    at[0] = Storage<T>::narrow(first);
    if (has_second) {
      at[1] = Storage<T>::narrow(second);
    }
  }
}

// --- Steps of a block ----------------------------------------------------------------------------

// What a block is about, see RowBlock and TileOfTokens; in static shared memory.
constexpr int kRowBlockWords = 4, kTileWords = 3;
constexpr int kPlaceWords = kRowBlockWords + 2 * kTileWords;

// How a block uses its dynamic shared memory.
struct Plan {
  std::int64_t panel;  // tokens that are done at a time; all of them as a rule
  int kept_stride;     // row stride of the kept rows, 0 where they do not fit
};

// What the kept rows are stored as. They are the weights themselves, so half types take half the
// room; one by one they would be narrower than a bank.
template <typename T, bool kPacks>
using Kept = std::conditional_t<kPacks, T, Accumulate<T>>;

template <typename T, bool kPacks>
struct Workspace {
  using A = Accumulate<T>;
  SharedPtr<A> x, y;                // [16, kStride], chunks of X and Y; then the warps' sums
  SharedPtr<A> coefficients;        // [panel, 16 rows]
  SharedPtr<Kept<T, kPacks>> kept;  // [16, kept_stride]
  int kept_stride;
};

template <typename T, bool kPacks>
__device__ __forceinline__ Workspace<T, kPacks> make_workspace(
    SharedPtr<Accumulate<T>> memory, const Plan& plan) {
  using A = Accumulate<T>;
  Workspace<T, kPacks> w;
  w.x = memory;
  w.y = w.x + kTileRows * kStride<A>;
  w.coefficients = w.y + kTileTokens * kStride<A>;
  w.kept = simt::pointer_cast<Kept<T, kPacks>>(w.coefficients + plan.panel * kTileRows);
  w.kept_stride = plan.kept_stride;
  return w;
}

template <typename T, bool kPacks>
std::size_t workspace_bytes(const Plan& plan) {
  using A = Accumulate<T>;
  const std::int64_t elements = 2 * kTileRows * kStride<A> + plan.panel * kTileRows;
  const std::int64_t kept = std::int64_t{plan.kept_stride} * kTileRows;
  return static_cast<std::size_t>(elements) * sizeof(A) +
         static_cast<std::size_t>(kept) * sizeof(Kept<T, kPacks>);
}

// Blocks of a row kernel that a multiprocessor shall hold at the same time, as far as registers go:
// three take 80 of them, which is enough for float32 weights read in packs, with the code that nvcc
// makes for sm_90 and sm_100.
template <typename T, bool kLean>
struct Blocks {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
  static constexpr bool kThree = false;
#else
  static constexpr bool kThree = kLean && std::is_same_v<T, float>;
#endif
  static constexpr int kCount = sizeof(Accumulate<T>) == 8 ? 1 : (kThree ? 3 : 2);
};

// Room for the coefficients of all tokens comes first, then room for the kept rows, if that leaves
// room for the other blocks. A multiprocessor has 1 KiB more than a block can have, and takes 1 KiB
// for each; 227 KiB for a block is sm_90 or more.
template <typename T, bool kPacks>
Plan make_plan(std::int64_t s, std::int64_t d, std::size_t largest) {
  constexpr std::size_t kReserved = 1024;
  constexpr std::size_t kPlace = kPlaceWords * sizeof(std::int64_t);
  const std::size_t blocks =
      largest < 227 * 1024 ? std::min(Blocks<T, kPacks>::kCount, 2) : Blocks<T, kPacks>::kCount;
  const std::size_t limit = largest - kPlace;
  const std::size_t share = (largest + kReserved) / blocks - kReserved - kPlace;
  Plan plan{s, 0};
  while (plan.panel > kTileTokens && workspace_bytes<T, kPacks>(plan) > limit) {
    plan.panel = (plan.panel - 1) / kTileTokens * kTileTokens;
  }
  const Plan with_rows{plan.panel, static_cast<int>((d + kChunk - 1) / kChunk * kChunk)};
  return workspace_bytes<T, kPacks>(with_rows) <= share ? with_rows : plan;
}

// The 16 rows of a block.
template <typename T>
struct Rows {
  GlobalPtr<const T> kept;  // K: W0 or G, from the block's first row on
  int count;
  std::int64_t d;
  bool is_kept;  // whether K lies in shared memory already
};

// sums[row][token] += X Y^T over one chunk, of this warp's 16 columns and this lane's rows
// (lane / 4, lane / 4 + 8) and tokens (lane % 4 + 4 i).
template <int kTokensPerLane, typename T, bool kPacks>
__device__ __forceinline__ void multiply_chunk(
    const Workspace<T, kPacks>& w, Accumulate<T> (&sums)[2][kTileTokens / 4]) {
  using A = Accumulate<T>;
  constexpr int kColumns = kChunk / kWarps;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first = static_cast<int>(threadIdx.x) / 32 * kColumns;
  const SharedPtr<A> x = w.x + (lane / 4 * kStride<A> + first);
  const SharedPtr<A> y = w.y + (lane % 4 * kStride<A> + first);
  IMMUNIZE_EXT_UNROLL_BY(1)
  for (int k = 0; k < kColumns; k += kPack<A>) {
    const simt::Pack<A, kPack<A>> upper = simt::load_pack<kPack<A>>(x + k);
    const simt::Pack<A, kPack<A>> lower = simt::load_pack<kPack<A>>(x + (8 * kStride<A> + k));
    IMMUNIZE_EXT_UNROLL
    for (int i = 0; i < kTokensPerLane; ++i) {
      const simt::Pack<A, kPack<A>> token = simt::load_pack<kPack<A>>(y + (4 * i * kStride<A> + k));
      IMMUNIZE_EXT_UNROLL
      for (int v = 0; v < kPack<A>; ++v) {
        sums[0][i] += upper.values[v] * token.values[v];
        sums[1][i] += lower.values[v] * token.values[v];
      }
    }
  }
}

// Up to 16 tokens whose rows start at y, against X = K, or W_n - K where there is a W_n.
template <typename T>
struct Tokens {
  GlobalPtr<const T> adapted;        // W_n, from the block's first row on
  GlobalPtr<const Accumulate<T>> y;  // [count, d]
  int count;                         // 0: no tokens
};

// The coefficients X_row . Y_token of thread (row = t / 16, token = t % 16), for two tiles of
// tokens; the second may be empty. X is K or, if kAdapted, the tile's `adapted` - K. Fills the kept
// rows if there is room and it has not happened yet. squared_norm, if kNorm, gets |K_row|^2.
// rows() and tile(0), tile(1) are asked again and again, see RowBlock.
// All threads of the block call it; on return, the chunks are free again.
template <typename T, bool kPacks, bool kAdapted, bool kNorm, typename GetRows, typename GetTile>
__device__ __forceinline__ void project(
    const Workspace<T, kPacks>& w,
    const GetRows& rows,
    const GetTile& tile,
    std::int64_t d,
    bool from_shared,
    Accumulate<T> (&totals)[2],
    double* squared_norm) {
  using A = Accumulate<T>;
  const int t = static_cast<int>(threadIdx.x);
  const int lane = t % 32, warp = t / 32;
  const bool fill = w.kept_stride > 0 && !from_shared;
  const bool two = tile(1).count > 0;
  const bool same_rows = !kAdapted || tile(0).adapted == tile(1).adapted;
  A kept[kPerThread], moved[kPerThread], token_rows[kPerThread];
  A sums[2][2][kTileTokens / 4] = {};
  double norm = 0;

  const auto load_kept = [&](int column) {
    if (from_shared) {
      move_shared<T, kPacks, false>(w.kept + column, w.kept_stride, kept);
    } else {
      const Rows<T> of = rows();
      load_chunk<T, kPacks, true>(of.kept, of.count, d, column, kept);
    }
  };
  const auto load_tile = [&](int i, bool with_rows, int column) {
    const Tokens<T> of = tile(i);
    if (kAdapted && with_rows) {
      load_chunk<T, kPacks, true>(of.adapted, rows().count, d, column, moved);
    }
    load_chunk<A, kPacks>(of.y, of.count, d, column, token_rows);
  };
  load_kept(0);
  load_tile(0, true, 0);
  for (int column = 0; column < d; column += kChunk) {
    if (fill) {
      move_shared<T, kPacks, true>(w.kept + column, w.kept_stride, kept);
    }
    IMMUNIZE_EXT_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && !two) {
        break;
      }
      if (i == 0 || !same_rows) {
        if (kAdapted) {
          IMMUNIZE_EXT_UNROLL
          for (int v = 0; v < kPerThread; ++v) {
            moved[v] -= kept[v];
          }
          move_shared<T, kPacks, true>(w.x, kStride<A>, moved);
        } else {
          move_shared<T, kPacks, true>(w.x, kStride<A>, kept);
        }
      }
      move_shared<A, kPacks, true>(w.y, kStride<A>, token_rows);
      __syncthreads();
      // What comes next is on its way while this chunk is multiplied.
      if (i == 0 && two) {
        load_tile(1, !same_rows, column);
      } else if (column + kChunk < d) {
        load_kept(column + kChunk);
        load_tile(0, true, column + kChunk);
      }
      const int count = tile(i).count;
      if (count <= 8) {
        multiply_chunk<2>(w, sums[i]);
      } else if (count <= 12) {
        multiply_chunk<3>(w, sums[i]);
      } else {
        multiply_chunk<4>(w, sums[i]);
      }
      if (kNorm && i == 0) {
        IMMUNIZE_EXT_UNROLL
        for (int v = 0; v < kChunk / kTileTokens; ++v) {
          const A value = w.x[t / kTileTokens * kStride<A> + v * kTileTokens + t % kTileTokens];
          norm += static_cast<double>(value) * static_cast<double>(value);
        }
      }
      __syncthreads();
    }
  }
  if (kNorm) {
    for (int offset = kTileTokens / 2; offset > 0; offset /= 2) {
      norm += __shfl_xor_sync(0xFFFFFFFF, norm, offset);
    }
    *squared_norm = norm;
  }
  // The warps' sums of the first tile go where X was, of the second where Y was.
  IMMUNIZE_EXT_UNROLL
  for (int which = 0; which < 2; ++which) {
    const SharedPtr<A> parts = which == 0 ? w.x : w.y;
    IMMUNIZE_EXT_UNROLL
    for (int half = 0; half < 2; ++half) {
      IMMUNIZE_EXT_UNROLL
      for (int i = 0; i < kTileTokens / 4; ++i) {
        const int row = lane / 4 + 8 * half;
        parts[(warp * kTileRows + row) * kTileTokens + lane % 4 + 4 * i] = sums[which][half][i];
      }
    }
  }
  __syncthreads();
  IMMUNIZE_EXT_UNROLL
  for (int which = 0; which < 2; ++which) {
    const SharedPtr<A> parts = which == 0 ? w.x : w.y;
    totals[which] = 0;
    IMMUNIZE_EXT_UNROLL
    for (int i = 0; i < kWarps; ++i) {
      totals[which] += parts[i * kThreads + t];
    }
  }
  __syncthreads();
}

// out = previous + sign coefficients Z for all columns, over `tokens` coefficients; z points at the
// first of their rows. previous: the kept rows (`from_kept`), the null pointer for zero, or any
// matrix like out, out itself included. Returns whether what this thread wrote is finite.
template <typename T, bool kPacks>
__device__ __forceinline__ bool combine(
    const Workspace<T, kPacks>& w,
    const Rows<T>& rows,
    SharedPtr<Accumulate<T>> coefficients,
    std::int64_t tokens,
    GlobalPtr<const Accumulate<T>> z,
    Accumulate<T> sign,
    bool from_kept,
    SharedPtr<const T> previous,
    SharedPtr<T> out) {
  using A = Accumulate<T>;
  const bool in_shared = from_kept && rows.is_kept;
  if (from_kept) {
    previous = rows.kept;
  }
  constexpr int kRowsAtOnce = 4;  // what 80 registers leave room for
  A spoiled = 0;                  // x - x of all results: 0, or NaN if one is infinite or NaN
  for (int start = 0; start < rows.d; start += kPairColumns) {
    if (from_kept && !in_shared) {
      prefetch_rows<T>(rows.kept, rows.count, rows.d, start);
    }
    const int k = start + 2 * static_cast<int>(threadIdx.x);
    if (k >= rows.d) {
      break;
    }
    const bool has_second = kPacks || k + 1 < rows.d;
    A sums[kTileRows][2] = {};
    SharedPtr<const A> z_row = z + k;
    SharedPtr<const A> factors = coefficients;
    A next[2] = {};
    if (tokens > 0) {
      load_pair<A, kPacks>(z_row, has_second, next);
    }
    IMMUNIZE_EXT_UNROLL_BY(1)
    for (std::int64_t j = 0; j < tokens; ++j) {
      const A pair[2] = {next[0], next[1]};
      z_row += rows.d;
      if (j + 1 < tokens) {
        load_pair<A, kPacks>(z_row, has_second, next);  // on its way during the products
      }
      IMMUNIZE_EXT_UNROLL
      for (int i = 0; i < kTileRows; i += kPack<A>) {
        const simt::Pack<A, kPack<A>> factor = simt::load_pack<kPack<A>>(factors + i);
        IMMUNIZE_EXT_UNROLL
        for (int v = 0; v < kPack<A>; ++v) {
          sums[i + v][0] += factor.values[v] * pair[0];
          sums[i + v][1] += factor.values[v] * pair[1];
        }
      }
      factors += kTileRows;
    }
    SharedPtr<const T> from_row = previous;
    SharedPtr<T> out_row = out + k;
    if (previous) {
      from_row += k;
    }
    // Some rows at a time, all of their loads before their stores: a store may be to where the next
    // load is from, for all the compiler knows, and rows would wait for memory one after the other.
    IMMUNIZE_EXT_UNROLL
    for (int begin = 0; begin < kTileRows; begin += kRowsAtOnce) {
      A old[kRowsAtOnce][2] = {};
      const int count = rows.count - begin;
      if (in_shared) {
        IMMUNIZE_EXT_UNROLL
        for (int i = 0; i < kRowsAtOnce; ++i) {
          const SharedPtr<const Kept<T, kPacks>> row = w.kept + ((begin + i) * w.kept_stride + k);
          if (i < count) {
            load_pair<Kept<T, kPacks>, true>(row, true, old[i]);
          }
        }
      } else if (previous) {
        IMMUNIZE_EXT_UNROLL
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (i < count) {
            load_pair<T, kPacks>(from_row, has_second, old[i]);
          }
          from_row += rows.d;
        }
      }
      IMMUNIZE_EXT_UNROLL
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (i < count) {
          const A first = old[i][0] + sign * sums[begin + i][0];
          const A second = old[i][1] + sign * sums[begin + i][1];
          store_pair<T, kPacks>(out_row, has_second, first, second);
          out_row += rows.d;
          // As they are stored: a half type overflows where float32 does not.
          const A stored = Storage<T>::widen(Storage<T>::narrow(first));
          const A other = has_second ? Storage<T>::widen(Storage<T>::narrow(second)) : A(0);
          spoiled += (stored - stored) + (other - other);
        }
      }
    }
  }
  return spoiled == A(0);
}

// The rows of a block. They lie in shared memory and are read wherever they are used: in registers
// they would be carried through the products, which need them all.
struct RowBlock {
  std::int64_t layer, batch;
  std::int64_t start;  // first row of the layer's, over the batch
  std::int64_t count;
};

// Two tiles of tokens, likewise.
struct TileOfTokens {
  std::int64_t first;  // token
  int concept_index, count;
};

// Finds block `block` of a problem, for published.
template <typename Problem>
__device__ __forceinline__ void publish(
    const Problem& p, std::int64_t block, SharedPtr<std::int64_t> to) {
  if (threadIdx.x == 0) {
    const std::int64_t batch = block / p.blocks_of_a_batch, within = block % p.blocks_of_a_batch;
    const int index = find_interval(p.first_block, p.layer_count, within);
    const std::int64_t rows = p.rows_of(index);
    const std::int64_t before = p.first_block[index];
    const std::int64_t begin = (within - before) * kTileRows;
    to[0] = index;
    to[1] = batch;
    to[2] = batch * rows + begin;
    to[3] = min(rows - begin, std::int64_t{kTileRows});
  }
  __syncthreads();
}
__device__ __forceinline__ RowBlock published(SharedPtr<const std::int64_t> from) {
  RowBlock block;
  block.layer = from[0];
  block.batch = from[1];
  block.start = from[2];
  block.count = from[3];
  return block;
}

// The next two tiles of the tokens [next, to), for published_tile. The tokens of a concept, between
// two neighbours of first_token, are one tile or several; null: all are of one concept.
__device__ __forceinline__ void publish_tiles(
    SharedPtr<std::int64_t> where,
    SharedPtr<const std::int64_t> first_token,
    std::int64_t next,
    std::int64_t to) {
  if (threadIdx.x == 0) {
    int concept_index = 0;
    for (int i = 0; i < 2; ++i) {
      std::int64_t end = to;
      if (first_token && next < to) {
        end = first_token[concept_index + 1];
        while (end <= next) {
          ++concept_index;
          end = first_token[concept_index + 1];
        }
      }
      const std::int64_t count = min(min(end, to) - next, std::int64_t{kTileTokens});
      const SharedPtr<std::int64_t> at = where + (kRowBlockWords + i * kTileWords);
      at[0] = next;
      at[1] = concept_index;
      at[2] = count;
      next += count;
    }
  }
  __syncthreads();
}
__device__ __forceinline__ TileOfTokens
published_tile(SharedPtr<const std::int64_t> from, int which) {
  const SharedPtr<const std::int64_t> at = from + (kRowBlockWords + which * kTileWords);
  TileOfTokens tile;
  tile.first = at[0];
  const std::int64_t concept_index = at[1], count = at[2];
  tile.concept_index = static_cast<int>(concept_index);
  tile.count = static_cast<int>(count);
  return tile;
}

// --- Forward -------------------------------------------------------------------------------------

template <typename T>
struct ApplyProblem {
  GlobalPtr<const ApplyLayer<T>> layers;
  GlobalPtr<const std::int64_t> first_block;  // [L + 1] row blocks of the layers before
  GlobalPtr<const Weight<T>> targets;         // [N, L] concept weights; null for values
  GlobalPtr<const std::int64_t> first_token;  // [N + 1] tokens of the concepts before
  GlobalPtr<const Accumulate<T>> c, b;        // [batch, s, d]
  GlobalPtr<const double> token_norm;         // [batch, s] |c_j|, for values only
  GlobalPtr<int> status;                      // [batch, L], see merge_status.h
  std::int64_t batch, s, d, blocks_of_a_batch;
  int layer_count, concepts;

  __device__ __forceinline__ std::int64_t rows_of(int index) const {
    const ApplyLayer<T> layer = layers[index];
    return layer.rows;
  }
  // K of a block, the rows of W0.
  __device__ __forceinline__ Rows<T> kept(const RowBlock& at, bool is_kept) const {
    const ApplyLayer<T> layer = layers[at.layer];
    return {layer.base + at.start * d, static_cast<int>(at.count), d, is_kept};
  }
  // Without W_n for values.
  __device__ __forceinline__ Tokens<T> tokens(const RowBlock& at, const TileOfTokens& tile) const {
    Tokens<T> found{nullptr, c + (at.batch * s + tile.first) * d, tile.count};
    if (targets && tile.count > 0) {
      const Weight<T> target = targets[std::int64_t{tile.concept_index} * layer_count + at.layer];
      found.adapted = target.data + at.start * d;
    }
    return found;
  }
};

template <typename T, bool kPacks, bool kValues>
__global__ void __launch_bounds__(kThreads, (Blocks<T, kPacks && !kValues>::kCount))
    merge_apply_rows(const ApplyProblem<T> p, const Plan plan) {
  using A = Accumulate<T>;
  SIMT_DYNAMIC_SHARED(A, memory);
  SIMT_SHARED_ARRAY(std::int64_t, place, kPlaceWords);
  const Workspace<T, kPacks> w = make_workspace<T, kPacks>(memory, plan);
  // Twice the rounding of a dot product in units of |w| |c|: 2 eps.
  constexpr double kRounding =
      sizeof(A) == 4 ? 2.0 * 1.1920928955078125e-07 : 2.0 * 2.220446049250313e-16;
  for (std::int64_t block = blockIdx.x; block < p.batch * p.blocks_of_a_batch; block += gridDim.x) {
    publish(p, block, place);
    bool is_kept = false;
    for (std::int64_t from = 0; from < p.s || from == 0; from += plan.panel) {
      // Made where they are used, again to save registers.
      const auto to = [&] { return min(from + plan.panel, p.s); };
      for (std::int64_t next = from; next < to();) {
        publish_tiles(place, p.first_token, next, to());
        const auto rows = [&] { return p.kept(published(place), false); };
        const auto tile = [&](int i) {
          return p.tokens(published(place), published_tile(place, i));
        };
        double squared_norm = 0;
        A totals[2];
        project<T, kPacks, !kValues, kValues>(w, rows, tile, p.d, is_kept, totals, &squared_norm);
        is_kept = w.kept_stride > 0;
        const RowBlock at = published(place);
        const ApplyLayer<T> layer = p.layers[at.layer];
        const int row = static_cast<int>(threadIdx.x) / kTileTokens;
        const int column = static_cast<int>(threadIdx.x) % kTileTokens;
        IMMUNIZE_EXT_UNROLL
        for (int i = 0; i < 2; ++i) {
          const TileOfTokens tokens = published_tile(place, i);
          if (column < tokens.count) {
            const std::int64_t token = tokens.first + column;
            const bool exists = row < at.count;
            const std::int64_t entry = (at.start + row) * p.s + token;
            A r = totals[i];
            if (kValues && exists) {
              const A value = layer.values[entry];
              const double norm = p.token_norm[at.batch * p.s + token];
              r = value - r;
              // What W0 gives already, up to the rounding of a dot product, is no edit. An infinite
              // edit has an infinite bound and is to stay one, for the check below.
              const double bound = kRounding * sqrt(squared_norm) * norm;
              if (fabs(static_cast<double>(r)) <= bound && r - r == A(0)) {
                r = 0;
              }
            }
            w.coefficients[(token - from) * kTileRows + row] = r;
            if (exists) {
              layer.residual[entry] = r;
              if (!(r - r == A(0))) {  // infinite or NaN
                atomicOr(p.status + (at.batch * p.layer_count + at.layer), kNotFinite);
              }
            }
          }
        }
        const TileOfTokens last = published_tile(place, 1);
        next = last.first + last.count;
        __syncthreads();
      }
      __syncthreads();
      const RowBlock at = published(place);
      const ApplyLayer<T> layer = p.layers[at.layer];
      const GlobalPtr<T> merged = layer.merged + at.start * p.d;
      const bool finite = combine<T, kPacks>(
          w, p.kept(at, is_kept), w.coefficients, to() - from, p.b + (at.batch * p.s + from) * p.d,
          A(1), from == 0, SharedPtr<const T>(merged), SharedPtr<T>(merged));
      if (!finite) {
        const RowBlock of = published(place);
        atomicOr(p.status + (of.batch * p.layer_count + of.layer), kOverflow);
      }
      __syncthreads();
      if (p.s == 0) {
        break;
      }
    }
  }
}

// --- Backward, row by row ------------------------------------------------------------------------

template <typename T>
struct BackwardProblem {
  GlobalPtr<const BackwardLayer<T>> layers;
  GlobalPtr<const std::int64_t> first_block;  // [L + 1]
  GlobalPtr<const Gradient<T>> grad_targets;  // [N, L], not read where not wanted
  GlobalPtr<const std::int64_t> first_token;  // [N + 1]
  GlobalPtr<const Accumulate<T>> c, b;        // [batch, s, d]
  std::int64_t batch, s, d, blocks_of_a_batch;
  int layer_count, concepts;
  bool want_targets;

  __device__ __forceinline__ std::int64_t rows_of(int index) const {
    const BackwardLayer<T> layer = layers[index];
    return layer.rows;
  }
  // K of a block, the rows of G.
  __device__ __forceinline__ Rows<T> kept(const RowBlock& at, bool is_kept) const {
    const BackwardLayer<T> layer = layers[at.layer];
    return {layer.grad + at.start * d, static_cast<int>(at.count), d, is_kept};
  }
  __device__ __forceinline__ Tokens<T> tokens(const RowBlock& at, const TileOfTokens& tile) const {
    return {nullptr, b + (at.batch * s + tile.first) * d, tile.count};
  }
};

template <typename T, bool kPacks>
__global__ void __launch_bounds__(kThreads, (Blocks<T, kPacks>::kCount))
    merge_backward_rows(const BackwardProblem<T> p, const Plan plan) {
  using A = Accumulate<T>;
  SIMT_DYNAMIC_SHARED(A, memory);
  SIMT_SHARED_ARRAY(std::int64_t, place, kPlaceWords);
  const Workspace<T, kPacks> w = make_workspace<T, kPacks>(memory, plan);
  for (std::int64_t block = blockIdx.x; block < p.batch * p.blocks_of_a_batch; block += gridDim.x) {
    publish(p, block, place);
    bool is_kept = false;
    for (std::int64_t from = 0; from < p.s || from == 0; from += plan.panel) {
      // Made where they are used, again to save registers.
      const auto to = [&] { return min(from + plan.panel, p.s); };
      for (std::int64_t next = from; next < to();) {
        publish_tiles(place, nullptr, next, to());
        const auto rows = [&] { return p.kept(published(place), false); };
        const auto tile = [&](int i) {
          return p.tokens(published(place), published_tile(place, i));
        };
        A totals[2];
        project<T, kPacks, false, false>(w, rows, tile, p.d, is_kept, totals, nullptr);
        is_kept = w.kept_stride > 0;
        const RowBlock at = published(place);
        const BackwardLayer<T> layer = p.layers[at.layer];
        const int row = static_cast<int>(threadIdx.x) / kTileTokens;
        const int column = static_cast<int>(threadIdx.x) % kTileTokens;
        IMMUNIZE_EXT_UNROLL
        for (int i = 0; i < 2; ++i) {
          const TileOfTokens tokens = published_tile(place, i);
          if (column < tokens.count) {
            const std::int64_t token = tokens.first + column;
            w.coefficients[(token - from) * kTileRows + row] = totals[i];
            if (row < at.count && layer.grad_coefficients) {
              layer.grad_coefficients[(at.start + row) * p.s + token] = totals[i];
            }
          }
        }
        const TileOfTokens last = published_tile(place, 1);
        next = last.first + last.count;
        __syncthreads();
      }
      __syncthreads();
      const RowBlock at = published(place);
      const BackwardLayer<T> layer = p.layers[at.layer];
      const Rows<T> rows = p.kept(at, is_kept);
      const GlobalPtr<const A> c = p.c + at.batch * p.s * p.d;
      if (layer.grad_base) {
        const GlobalPtr<T> out = layer.grad_base + at.start * p.d;
        combine<T, kPacks>(
            w, rows, w.coefficients, to() - from, c + from * p.d, A(-1), from == 0,
            SharedPtr<const T>(out), SharedPtr<T>(out));
      }
      for (int n = 0; p.want_targets && n < p.concepts; ++n) {
        const std::int64_t concept_begin = p.first_token[n], concept_end = p.first_token[n + 1];
        const std::int64_t low = max(concept_begin, from);
        const std::int64_t tokens = min(concept_end, to()) - low;
        // A concept without tokens still has a gradient, zero: its first panel writes it.
        if (tokens > 0 || (concept_begin == concept_end && from == 0)) {
          const Gradient<T> gradient = p.grad_targets[std::int64_t{n} * p.layer_count + at.layer];
          const GlobalPtr<T> out = gradient.data + at.start * p.d;
          SharedPtr<const T> previous = nullptr;
          if (low > concept_begin) {
            previous = out;
          }
          combine<T, kPacks>(
              w, rows, w.coefficients + (tokens > 0 ? (low - from) * kTileRows : 0),
              max(tokens, std::int64_t{0}), c + (tokens > 0 ? low * p.d : 0), A(1), false, previous,
              SharedPtr<T>(out));
        }
      }
      __syncthreads();
      if (p.s == 0) {
        break;
      }
    }
  }
}

// --- Backward, sums over rows --------------------------------------------------------------------

template <typename T>
struct SumProblem {
  GlobalPtr<const SumLayer<T>> layers;
  GlobalPtr<const std::int64_t> first_group;  // [L + 1] row groups of the layers before
  GlobalPtr<const Weight<T>> targets;         // [N, L]; null: X is plain, else W_n - plain
  GlobalPtr<const TokenTile> tiles;           // [tile_count]
  GlobalPtr<double> partial;                  // [batch, splits, s, d]
  std::int64_t batch, s, d, groups, splits, tile_count, column_tiles;
  int layer_count;
};

// partial[split] = sum over the split's rows of coefficients^T X. A thread owns 2 columns of up to
// 16 tokens.
template <typename T, bool kPacks>
__global__ void __launch_bounds__(kThreads, sizeof(Accumulate<T>) == 4 ? 2 : 1)
    merge_sum_rows(const SumProblem<T> p) {
  using A = Accumulate<T>;
  constexpr int kAtOnce = 8;  // rows whose loads are under way at the same time
  SIMT_SHARED_ARRAY(A, staged, 2 * kTileRows * kTileTokens);
  const int t = static_cast<int>(threadIdx.x);
  const std::int64_t blocks = p.batch * p.splits * p.column_tiles * p.tile_count;
  int buffer = 0;
  for (std::int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // The tiles of tokens that read the same rows are neighbours, so that the second finds them in
    // the cache.
    const TokenTile tile = p.tiles[block % p.tile_count];
    std::int64_t rest = block / p.tile_count;
    const std::int64_t k = rest % p.column_tiles * kPairColumns + 2 * t;
    const bool has_second = k + 1 < p.d;
    rest /= p.column_tiles;
    const std::int64_t split = rest % p.splits, batch = rest / p.splits;
    const GlobalPtr<double> partial =
        p.partial + ((batch * p.splits + split) * p.s + tile.first) * p.d;
    const std::int64_t first = split * p.groups / p.splits;
    const std::int64_t last = (split + 1) * p.groups / p.splits;
    for (std::int64_t group = first; group < last; ++group) {
      const int index = find_interval(p.first_group, p.layer_count, group);
      const SumLayer<T> layer = p.layers[index];
      const std::int64_t before = p.first_group[index];
      const std::int64_t begin = (group - before) * kGroupRows;
      const std::int64_t end = min(begin + kGroupRows, layer.rows);
      const std::int64_t start = batch * layer.rows;
      GlobalPtr<const T> adapted = nullptr;
      if (p.targets) {
        const Weight<T> target = p.targets[tile.concept_index * p.layer_count + index];
        adapted = target.data;
      }
      A sums[kTileTokens][2] = {};
      for (std::int64_t at = begin; at < end; at += kTileRows) {
        A coefficient = 0;
        if (at + t / kTileTokens < end && t % kTileTokens < tile.count) {
          coefficient = layer.coefficients
                            [(start + at + t / kTileTokens) * p.s + tile.first + t % kTileTokens];
        }
        // Two buffers in turn: who writes one has seen everybody leave it at the barrier before.
        const SharedPtr<A> rows = staged + buffer * kThreads;
        buffer ^= 1;
        rows[t] = coefficient;
        __syncthreads();
        if (k < p.d) {
          IMMUNIZE_EXT_UNROLL_BY(1)
          for (int i = 0; i < kTileRows; i += kAtOnce) {
            A x[kAtOnce][2];
            IMMUNIZE_EXT_UNROLL
            for (int v = 0; v < kAtOnce; ++v) {
              x[v][0] = x[v][1] = 0;
              if (at + i + v < end) {
                const std::int64_t row = (start + at + i + v) * p.d + k;
                load_pair<T, kPacks>(layer.plain + row, has_second, x[v]);
                if (adapted) {
                  A moved[2];
                  load_pair<T, kPacks>(adapted + row, has_second, moved);
                  x[v][0] = moved[0] - x[v][0];
                  x[v][1] = moved[1] - x[v][1];
                }
              }
            }
            IMMUNIZE_EXT_UNROLL
            for (int v = 0; v < kAtOnce; ++v) {
              IMMUNIZE_EXT_UNROLL
              for (int j = 0; j < kTileTokens; j += kPack<A>) {
                const simt::Pack<A, kPack<A>> factor =
                    simt::load_pack<kPack<A>>(rows + ((i + v) * kTileTokens + j));
                IMMUNIZE_EXT_UNROLL
                for (int u = 0; u < kPack<A>; ++u) {
                  sums[j + u][0] += factor.values[u] * x[v][0];
                  sums[j + u][1] += factor.values[u] * x[v][1];
                }
              }
            }
          }
        }
      }
      if (k < p.d) {
        IMMUNIZE_EXT_UNROLL
        for (int j = 0; j < kTileTokens; ++j) {
          if (j < tile.count) {
            IMMUNIZE_EXT_UNROLL
            for (int v = 0; v < 2; ++v) {
              if (k + v < p.d) {
                const double added = static_cast<double>(sums[j][v]);
                if (group == first) {
                  partial[j * p.d + k + v] = added;
                } else {
                  partial[j * p.d + k + v] += added;
                }
              }
            }
          }
        }
      }
    }
  }
}

// out[batch] = sign * sum of the batch's partial sums, in order. size is s * d.
static __global__ void __launch_bounds__(kThreads) add_partial_sums(
    GlobalPtr<const double> partial,
    GlobalPtr<double> out,
    std::int64_t batch,
    std::int64_t splits,
    std::int64_t size,
    double sign) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < batch * size;
       i += step) {
    const GlobalPtr<const double> first = partial + (i / size * splits * size + i % size);
    double sum = 0;
    for (std::int64_t split = 0; split < splits; ++split) {
      sum += first[split * size];
    }
    out[i] = sign * sum;
  }
}

// --- Launches ------------------------------------------------------------------------------------

// Blocks loop over what does not fit into the grid.
inline dim3 grid_of(std::int64_t blocks, std::int64_t largest_grid = 0x7FFFFFFF) {
  return dim3(static_cast<unsigned>(std::min(blocks, largest_grid)));
}

// What both row kernels and both sums share about a problem; see ApplyProblem.
template <typename T>
struct Shared {
  GlobalPtr<const Accumulate<T>> c, b;
  std::int64_t batch, s, d;
  std::vector<std::int64_t> first_token;  // [N + 1]
  std::int64_t largest_grid = 0x7FFFFFFF;
};

// Whether rows of d elements from these pointers on can be read by 16-byte packs.
template <typename T, typename... P>
bool rows_are_aligned(std::int64_t d, const P&... pointers) {
  return d % kPack<T> == 0 && (simt::is_aligned(pointers, 16) && ...);
}

// Words that the tables of one launch need at most.
inline std::int64_t table_words(std::int64_t layers, std::int64_t concepts, std::int64_t s) {
  constexpr std::int64_t kPointer = sizeof(GlobalPtr<const float>) / sizeof(std::uint64_t);
  return layers * (4 * kPointer + 1) + (layers + 1) + layers * concepts * kPointer +
         (concepts + 1) + 3 * (s / kTileTokens + concepts + 1);
}

// merged and residual of all layers. table: table_words(...) words; status: [batch, L] zeros.
template <typename T>
void launch_apply(
    const std::vector<ApplyLayer<T>>& layers,
    const std::vector<Weight<T>>& targets,  // [N, L], empty for values
    bool values,
    const Shared<T>& shared,
    GlobalPtr<const double> token_norm,
    GlobalPtr<int> status,
    GlobalPtr<std::uint64_t> table,
    Stream stream) {
  const std::vector<std::int64_t> first_block = starts_of(layers, kTileRows);
  const std::int64_t blocks = shared.batch * first_block.back();
  if (blocks == 0 || shared.d == 0) {
    return;
  }
  bool packs = rows_are_aligned<T>(shared.d, shared.c, shared.b);
  for (const ApplyLayer<T>& layer : layers) {
    packs = packs && rows_are_aligned<T>(shared.d, layer.base, layer.merged);
  }
  for (const Weight<T>& target : targets) {
    packs = packs && rows_are_aligned<T>(shared.d, target.data);
  }
  HostTables tables;
  ApplyProblem<T> p{};
  p.layers = simt::pointer_cast<const ApplyLayer<T>>(table + tables.add(layers));
  p.first_block = simt::pointer_cast<const std::int64_t>(table + tables.add(first_block));
  if (!values) {
    p.targets = simt::pointer_cast<const Weight<T>>(table + tables.add(targets));
  }
  p.first_token = simt::pointer_cast<const std::int64_t>(table + tables.add(shared.first_token));
  p.c = shared.c;
  p.b = shared.b;
  p.token_norm = token_norm;
  p.status = status;
  p.batch = shared.batch;
  p.s = shared.s;
  p.d = shared.d;
  p.blocks_of_a_batch = first_block.back();
  p.layer_count = static_cast<int>(layers.size());
  p.concepts = static_cast<int>(shared.first_token.size()) - 1;
  upload(tables, table, stream);
  const std::size_t limit = simt::shared_limit(stream);
  const Plan plan = packs ? make_plan<T, true>(shared.s, shared.d, limit)
                          : make_plan<T, false>(shared.s, shared.d, limit);
  const std::size_t bytes =
      packs ? workspace_bytes<T, true>(plan) : workspace_bytes<T, false>(plan);
  const auto kernel = packs ? (values ? SIMT_KERNEL(merge_apply_rows<T, true, true>)
                                      : SIMT_KERNEL(merge_apply_rows<T, true, false>))
                            : (values ? SIMT_KERNEL(merge_apply_rows<T, false, true>)
                                      : SIMT_KERNEL(merge_apply_rows<T, false, false>));
  simt::launch(
      kernel, grid_of(blocks, shared.largest_grid), dim3(kThreads), bytes, stream, p, plan);
}

// grad_base, grad_targets and dR of all layers, those that are not null. grad_targets: [N, L], or
// empty where not wanted.
template <typename T>
void launch_backward(
    const std::vector<BackwardLayer<T>>& layers,
    const std::vector<Gradient<T>>& grad_targets,
    const Shared<T>& shared,
    GlobalPtr<std::uint64_t> table,
    Stream stream) {
  const std::vector<std::int64_t> first_block = starts_of(layers, kTileRows);
  const std::int64_t blocks = shared.batch * first_block.back();
  if (blocks == 0 || shared.d == 0) {
    return;
  }
  bool packs = rows_are_aligned<T>(shared.d, shared.c, shared.b);
  for (const BackwardLayer<T>& layer : layers) {
    packs = packs && rows_are_aligned<T>(shared.d, layer.grad, layer.grad_base);
  }
  for (const Gradient<T>& gradient : grad_targets) {
    packs = packs && rows_are_aligned<T>(shared.d, gradient.data);
  }
  HostTables tables;
  BackwardProblem<T> p{};
  p.layers = simt::pointer_cast<const BackwardLayer<T>>(table + tables.add(layers));
  p.first_block = simt::pointer_cast<const std::int64_t>(table + tables.add(first_block));
  p.grad_targets = simt::pointer_cast<const Gradient<T>>(table + tables.add(grad_targets));
  p.first_token = simt::pointer_cast<const std::int64_t>(table + tables.add(shared.first_token));
  p.c = shared.c;
  p.b = shared.b;
  p.batch = shared.batch;
  p.s = shared.s;
  p.d = shared.d;
  p.blocks_of_a_batch = first_block.back();
  p.layer_count = static_cast<int>(layers.size());
  p.concepts = static_cast<int>(shared.first_token.size()) - 1;
  p.want_targets = !grad_targets.empty();
  upload(tables, table, stream);
  const std::size_t limit = simt::shared_limit(stream);
  const Plan plan = packs ? make_plan<T, true>(shared.s, shared.d, limit)
                          : make_plan<T, false>(shared.s, shared.d, limit);
  const std::size_t bytes =
      packs ? workspace_bytes<T, true>(plan) : workspace_bytes<T, false>(plan);
  const auto kernel = packs ? SIMT_KERNEL(merge_backward_rows<T, true>)
                            : SIMT_KERNEL(merge_backward_rows<T, false>);
  simt::launch(
      kernel, grid_of(blocks, shared.largest_grid), dim3(kThreads), bytes, stream, p, plan);
}

// How a sum over rows is spread over blocks. It depends on shapes alone, so that the order of
// additions is the same on every GPU.
struct SumPlan {
  std::vector<TokenTile> tiles;
  std::int64_t groups, splits, column_tiles;
};

template <typename Layer>
SumPlan make_sum_plan(
    const std::vector<Layer>& layers,
    const std::vector<std::int64_t>& first_token,
    std::int64_t batch,
    std::int64_t d) {
  SumPlan plan;
  for (std::size_t n = 0; n + 1 < first_token.size(); ++n) {
    for (std::int64_t j = first_token[n]; j < first_token[n + 1]; j += kTileTokens) {
      plan.tiles.push_back(
          {j, std::min<std::int64_t>(kTileTokens, first_token[n + 1] - j),
           static_cast<std::int64_t>(n)});
    }
  }
  plan.groups = starts_of(layers, kGroupRows).back();
  plan.column_tiles = (d + kPairColumns - 1) / kPairColumns;
  const std::int64_t of_a_split = std::max<std::int64_t>(
      1, batch * plan.column_tiles * static_cast<std::int64_t>(plan.tiles.size()));
  plan.splits = std::min(plan.groups, (kSumBlocks + of_a_split - 1) / of_a_split);
  return plan;
}

// out [batch, s, d] = sign * sum over layers and rows of coefficients^T X, X = W_n - plain, or
// plain where targets is empty. partial: [batch, plan.splits, s, d]. Tokens are grouped by
// shared.first_token; there must be rows, tokens and columns.
template <typename T>
void launch_sum(
    const std::vector<SumLayer<T>>& layers,
    const std::vector<Weight<T>>& targets,
    const Shared<T>& shared,
    const SumPlan& plan,
    double sign,
    GlobalPtr<double> partial,
    GlobalPtr<double> out,
    GlobalPtr<std::uint64_t> table,
    Stream stream) {
  bool packs = shared.d % kPack<T> == 0;
  for (const SumLayer<T>& layer : layers) {
    packs = packs && rows_are_aligned<T>(shared.d, layer.plain);
  }
  for (const Weight<T>& target : targets) {
    packs = packs && rows_are_aligned<T>(shared.d, target.data);
  }
  HostTables tables;
  SumProblem<T> p{};
  p.layers = simt::pointer_cast<const SumLayer<T>>(table + tables.add(layers));
  p.first_group =
      simt::pointer_cast<const std::int64_t>(table + tables.add(starts_of(layers, kGroupRows)));
  if (!targets.empty()) {
    p.targets = simt::pointer_cast<const Weight<T>>(table + tables.add(targets));
  }
  p.tiles = simt::pointer_cast<const TokenTile>(table + tables.add(plan.tiles));
  p.partial = partial;
  p.batch = shared.batch;
  p.s = shared.s;
  p.d = shared.d;
  p.groups = plan.groups;
  p.splits = plan.splits;
  p.tile_count = static_cast<std::int64_t>(plan.tiles.size());
  p.column_tiles = plan.column_tiles;
  p.layer_count = static_cast<int>(layers.size());
  upload(tables, table, stream);
  const std::int64_t blocks = p.batch * p.splits * p.column_tiles * p.tile_count;
  simt::launch(
      packs ? SIMT_KERNEL(merge_sum_rows<T, true>) : SIMT_KERNEL(merge_sum_rows<T, false>),
      grid_of(blocks, shared.largest_grid), dim3(kThreads), 0, stream, p);
  const std::int64_t size = shared.s * shared.d;
  simt::launch(
      SIMT_KERNEL(add_partial_sums), grid_of((p.batch * size + kThreads - 1) / kThreads),
      dim3(kThreads), 0, stream, GlobalPtr<const double>(partial), out, p.batch, p.splits, size,
      sign);
}

}  // namespace immunize_ext::merge
