// Gradient times K^-1 on the input side for small K, fused: one launch in place of a conversion to
// float64, two triangular solves with their copies and a conversion back.
//
//   result = grad (L L^T)^-1,  L the Cholesky factor of K (p x p, float64, p <= 128)
//
// Rows of grad are independent: a warp solves for one of them, lane l holding entries l, l + 32,
// ... in registers, with L in shared memory. L y = g goes column by column, L^T x = y row by row,
// so that in both the lanes of a warp read different banks. The order of operations does not depend
// on the grid.
//
// Beyond that size, and for the Woodbury form (n x p times rows, twice), the work is that of
// triangular solves and products with many right-hand sides, for which cuBLAS has the better tiles:
// precondition.cpp calls it.
#pragma once

#include <cstdint>

#include "portable.cuh"
#include "storage.cuh"

namespace immunize_ext::precondition {

using simt::GlobalPtr;
using simt::SharedPtr;
using simt::Stream;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSmallSide = 128;
constexpr int kSlots = kSmallSide / 32;  // numbers of a lane

// Distance of the rows of L in shared memory, odd.
__host__ __device__ constexpr int factor_stride(int side) {
  return side | 1;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) small_precondition(
    GlobalPtr<const T> grad,         // [rows, side]
    GlobalPtr<const double> factor,  // [side, side], lower
    GlobalPtr<T> result,             // [rows, side]
    std::int64_t rows,
    int side) {
  SIMT_DYNAMIC_SHARED(double, left);
  const int stride = factor_stride(side);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int e = static_cast<int>(threadIdx.x); e < side * side; e += kThreads) {
    const int i = e / side;
    const int j = e - i * side;
    if (j <= i) {
      const double value = factor[e];
      left[i * stride + j] = i == j ? 1.0 / value : value;  // reciprocals on the diagonal
    }
  }
  __syncthreads();
  for (std::int64_t row = std::int64_t{blockIdx.x} * kWarps + warp; row < rows;
       row += std::int64_t{gridDim.x} * kWarps) {
    double x[kSlots];
    IMMUNIZE_EXT_UNROLL
    for (int m = 0; m < kSlots; ++m) {
      x[m] = 0.0;
      if (lane + 32 * m < side) {
        const T value = grad[row * side + lane + 32 * m];
        x[m] = static_cast<double>(Storage<T>::widen(value));
      }
    }
    IMMUNIZE_EXT_UNROLL
    for (int m = 0; m < kSlots; ++m) {
      for (int i = 32 * m; i < min(side, 32 * (m + 1)); ++i) {
        const double reciprocal = left[i * stride + i];
        const double entry = __shfl_sync(0xFFFFFFFF, x[m], i % 32) * reciprocal;
        x[m] = lane == i % 32 ? entry : x[m];
        IMMUNIZE_EXT_UNROLL
        for (int u = m; u < kSlots; ++u) {
          const int k = lane + 32 * u;
          if (k > i && k < side) {
            const double value = left[k * stride + i];
            x[u] = fma(-value, entry, x[u]);
          }
        }
      }
    }
    IMMUNIZE_EXT_UNROLL
    for (int m = kSlots - 1; m >= 0; --m) {
      for (int i = min(side, 32 * (m + 1)) - 1; i >= 32 * m; --i) {
        const double reciprocal = left[i * stride + i];
        const double entry = __shfl_sync(0xFFFFFFFF, x[m], i % 32) * reciprocal;
        x[m] = lane == i % 32 ? entry : x[m];
        IMMUNIZE_EXT_UNROLL
        for (int u = 0; u <= m; ++u) {
          const int k = lane + 32 * u;
          if (k < i) {
            const double value = left[i * stride + k];
            x[u] = fma(-value, entry, x[u]);
          }
        }
      }
    }
    IMMUNIZE_EXT_UNROLL
    for (int m = 0; m < kSlots; ++m) {
      if (lane + 32 * m < side) {
        result[row * side + lane + 32 * m] = Storage<T>::narrow(static_cast<Accumulate<T>>(x[m]));
      }
    }
  }
}

inline std::size_t small_bytes(int side) {
  return sizeof(double) * static_cast<std::size_t>(side) *
         static_cast<std::size_t>(factor_stride(side));
}

// L fits into the registers of a warp and the shared memory of a block.
inline bool is_small(std::int64_t side, Stream stream) {
  return side >= 1 && side <= kSmallSide &&
         small_bytes(static_cast<int>(side)) <= simt::shared_limit(stream);
}

// Every block reads L, so no more of them than run at the same time.
inline unsigned small_grid(std::int64_t rows, int side, Stream stream) {
  const std::int64_t by_shared =
      static_cast<std::int64_t>(simt::shared_limit(stream) / small_bytes(side));
  const std::int64_t resident = by_shared < 8 ? by_shared : 8;
  const std::int64_t most = resident * simt::multiprocessor_count(stream);
  const std::int64_t wanted = (rows + kWarps - 1) / kWarps;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

template <typename T>
void launch_small_precondition(
    GlobalPtr<const T> grad,
    GlobalPtr<const double> factor,
    GlobalPtr<T> result,
    std::int64_t rows,
    int side,
    Stream stream) {
  if (rows == 0) {
    return;
  }
  simt::launch(
      SIMT_KERNEL(small_precondition<T>), dim3(small_grid(rows, side, stream)), dim3(kThreads),
      small_bytes(side), stream, grad, factor, result, rows, side);
}

}  // namespace immunize_ext::precondition
