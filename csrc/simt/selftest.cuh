// Small kernels for the tests of the executor: some right, most with one planted mistake each.
#pragma once

#include "../cuda/portable.cuh"

namespace immunize_ext::selftest {

using simt::GlobalPtr;
using simt::SharedPtr;
using simt::Stream;

constexpr unsigned kFullMask = 0xFFFFFFFF;

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

// --- Right kernels -------------------------------------------------------------------------------

// out[r] = sum of row r. One block per row, whole warps; dynamic shared memory: a T per warp.
template <typename T>
__global__ void __launch_bounds__(1024)
    row_sum(GlobalPtr<const T> x, GlobalPtr<T> out, std::int64_t columns) {
  SIMT_DYNAMIC_SHARED(T, partial);
  const GlobalPtr<const T> row = x + std::int64_t{blockIdx.x} * columns;
  T sum = 0;
  for (std::int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    sum += row[i];
  }
  sum = warp_sum(sum);
  const unsigned warp = threadIdx.x / warpSize;
  const unsigned lane = threadIdx.x % warpSize;
  if (lane == 0) {
    partial[warp] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    sum = warp_sum(lane < blockDim.x / warpSize ? partial[lane] : T(0));
    if (lane == 0) {
      out[blockIdx.x] = sum;
    }
  }
}

template <typename T>
void launch_row_sum(
    GlobalPtr<const T> x,
    GlobalPtr<T> out,
    std::int64_t rows,
    std::int64_t columns,
    unsigned threads,
    Stream stream) {
  const std::size_t shared_bytes = threads / 32 * sizeof(T);
  simt::launch(
      SIMT_KERNEL(row_sum<T>), dim3(static_cast<unsigned>(rows)), dim3(threads), shared_bytes,
      stream, x, out, columns);
}

// out (columns, rows) = x (rows, columns) transposed, by tiles in static shared memory.
constexpr int kTile = 8;

template <typename T>
__global__ void __launch_bounds__(kTile* kTile)
    transpose(GlobalPtr<const T> x, GlobalPtr<T> out, int rows, int columns) {
  SIMT_SHARED_ARRAY(T, tile, kTile * (kTile + 1));
  int row = static_cast<int>(blockIdx.y) * kTile + static_cast<int>(threadIdx.y);
  int column = static_cast<int>(blockIdx.x) * kTile + static_cast<int>(threadIdx.x);
  if (row < rows && column < columns) {
    tile[threadIdx.y * (kTile + 1) + threadIdx.x] = x[row * columns + column];
  }
  __syncthreads();
  row = static_cast<int>(blockIdx.y) * kTile + static_cast<int>(threadIdx.x);
  column = static_cast<int>(blockIdx.x) * kTile + static_cast<int>(threadIdx.y);
  if (row < rows && column < columns) {
    out[column * rows + row] = tile[threadIdx.x * (kTile + 1) + threadIdx.y];
  }
}

template <typename T>
void launch_transpose(
    GlobalPtr<const T> x, GlobalPtr<T> out, int rows, int columns, Stream stream) {
  const dim3 grid(
      static_cast<unsigned>((columns + kTile - 1) / kTile),
      static_cast<unsigned>((rows + kTile - 1) / kTile));
  simt::launch(
      SIMT_KERNEL(transpose<T>), grid, dim3(kTile, kTile), 0, stream, x, out, rows, columns);
}

// out = scale * x, four numbers at a time; n is a multiple of 4.
static __global__ void scale_packs(
    GlobalPtr<const float> x, GlobalPtr<float> out, float scale, std::int64_t n) {
  const std::int64_t i = 4 * (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  if (i < n) {
    simt::Pack<float, 4> pack = simt::load_pack<4>(x + i);
    for (float& value : pack.values) {
      value *= scale;
    }
    simt::store_pack(out + i, pack);
  }
}

// out[0] = sum of x: each block leaves its sum in partial, the last one to finish adds them in
// order. counter is 0. Without the fence the last block may see old partial sums.
template <bool fence>
__global__ void last_block_sum(
    GlobalPtr<const float> x,
    GlobalPtr<float> partial,
    GlobalPtr<int> counter,
    GlobalPtr<float> out) {
  SIMT_SHARED_ARRAY(bool, is_last, 1);
  const float sum = warp_sum<float>(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    if (fence) {
      __threadfence();
    }
    const int before = atomicAdd(&counter[0], 1);
    is_last[0] = before == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (is_last[0] && threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) {
      total += partial[i];
    }
    out[0] = total;
  }
}

// Each barrier, vote and shuffle once, for one block. Row k of out is what operation k gave.
static __global__ void collectives(GlobalPtr<const int> x, GlobalPtr<int> out) {
  const int t = static_cast<int>(threadIdx.x);
  const int n = static_cast<int>(blockDim.x);
  const int value = x[t];
  out[0 * n + t] = __syncthreads_or(value > 5);
  out[1 * n + t] = __syncthreads_and(value > 5);
  out[2 * n + t] = __syncthreads_count(value > 5);
  out[3 * n + t] = static_cast<int>(__ballot_sync(kFullMask, value > 5));
  out[4 * n + t] = __any_sync(kFullMask, value > 5);
  out[5 * n + t] = __all_sync(kFullMask, value > 5);
  out[6 * n + t] = __shfl_sync(kFullMask, value, 3, 8);
  out[7 * n + t] = __shfl_up_sync(kFullMask, value, 2, 16);
  out[8 * n + t] = __shfl_down_sync(kFullMask, value, 5);
  out[9 * n + t] = static_cast<int>(__shfl_xor_sync(kFullMask, 0.5 * value, 17) * 2);
}

// counts[x[i]] += 1, largest[0] = max x: atomics whose result does not depend on the order.
static __global__ void histogram(
    GlobalPtr<const int> x, GlobalPtr<int> counts, GlobalPtr<int> largest, std::int64_t n) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) {
    const int bin = x[i];
    atomicAdd(counts + bin, 1);
    atomicMax(&largest[0], bin);
  }
}

// out[t] = x reversed within its warp, through shared memory.
template <bool sync>
__global__ void reverse_warp(GlobalPtr<const float> x, GlobalPtr<float> out) {
  SIMT_SHARED_ARRAY(float, row, 1024);
  const unsigned t = threadIdx.x;
  row[t] = x[t];
  if (sync) {
    __syncwarp();
  }
  out[t] = row[t / 32 * 32 + 31 - t % 32];
}

static __global__ void empty_kernel() {}

// For timing: nothing but `count` barriers.
static __global__ void many_barriers(int count) {
  for (int i = 0; i < count; ++i) {
    __syncthreads();
  }
}

// --- Planted mistakes ----------------------------------------------------------------------------

// out = x reversed within the block; a barrier is missing between write and read.
static __global__ void missing_barrier(GlobalPtr<const float> x, GlobalPtr<float> out) {
  SIMT_SHARED_ARRAY(float, row, 1024);
  row[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

// A shared array is used again before everybody has read it.
static __global__ void missing_second_barrier(GlobalPtr<const float> x, GlobalPtr<float> out) {
  SIMT_SHARED_ARRAY(float, row, 1024);
  for (unsigned step = 0; step < 2; ++step) {
    row[threadIdx.x] = x[threadIdx.x] + static_cast<float>(step);
    __syncthreads();
    out[step * blockDim.x + threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
  }
}

// Two halves of the block wait at different barriers.
static __global__ void divergent_barrier(GlobalPtr<float> out) {
  if (threadIdx.x < blockDim.x / 2) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

// Threads beyond n leave; the others wait for them.
static __global__ void barrier_after_exit(GlobalPtr<float> out, unsigned n) {
  if (threadIdx.x >= n) {
    return;
  }
  __syncthreads();
  out[threadIdx.x] = 1;
}

// Half of a warp shuffles under a mask that names the whole.
static __global__ void divergent_shuffle(GlobalPtr<float> out) {
  float value = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 32 < 16) {
    value = __shfl_xor_sync(kFullMask, value, 1);
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = value;
}

// In a block of less than a warp, lanes that do not exist are read.
static __global__ void shuffle_from_absent_lane(GlobalPtr<float> out) {
  out[threadIdx.x] = warp_sum(1.0F);
}

// The last thread writes one element too far.
static __global__ void out_of_bounds_write(GlobalPtr<float> out) {
  out[threadIdx.x + 1] = 1;
  if (threadIdx.x == 0) {
    out[0] = 1;
  }
}

// An index below 0 is read.
static __global__ void out_of_bounds_read(GlobalPtr<const float> x, GlobalPtr<float> out) {
  out[threadIdx.x] = x[static_cast<int>(threadIdx.x) - 1];
}

// out is added to, but never set.
static __global__ void uninitialised_global(GlobalPtr<const float> x, GlobalPtr<float> out) {
  out[threadIdx.x] += x[threadIdx.x];
}

// One element of a shared array is never set.
static __global__ void uninitialised_shared(GlobalPtr<const float> x, GlobalPtr<float> out) {
  SIMT_SHARED_ARRAY(float, row, 1024);
  if (threadIdx.x != 5) {
    row[threadIdx.x] = x[threadIdx.x];
  }
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

// Element 3 of out is forgotten.
static __global__ void unwritten_output(GlobalPtr<float> out) {
  if (threadIdx.x != 3) {
    out[threadIdx.x] = 1;
  }
}

// All blocks write the same element.
static __global__ void race_between_blocks(GlobalPtr<int> out) {
  out[0] = static_cast<int>(blockIdx.x);
}

// The sum in float depends on the order of the atomics. out[0] is 0.
static __global__ void atomic_float_sum(GlobalPtr<const float> x, GlobalPtr<float> out) {
  atomicAdd(&out[0], static_cast<float>(x[blockIdx.x * blockDim.x + threadIdx.x]));
}

// Half of the threads use an atomic, half do not. out[0] is 0.
static __global__ void atomic_and_plain(GlobalPtr<int> out) {
  if (threadIdx.x % 2 == 0) {
    atomicAdd(&out[0], 1);
  } else {
    out[0] += 1;
  }
}

// A local array of 4 is indexed by `last`.
static __global__ void local_array_overflow(GlobalPtr<const int> x, GlobalPtr<int> out, int last) {
  int values[4];
  for (int i = 0; i <= last; ++i) {
    values[i] = x[i];
  }
  out[0] = values[x[0]];
}

// 32-bit index arithmetic overflows.
static __global__ void index_overflow(GlobalPtr<int> out, int rows, int columns) {
  out[0] = rows * columns;
}

// The largest of x without an atomic: two blocks may both find theirs larger. largest[0] is -1.
static __global__ void plain_maximum(GlobalPtr<const int> x, GlobalPtr<int> largest) {
  const int value = x[blockIdx.x];
  const int before = largest[0];
  if (value > before) {
    largest[0] = value;
  }
}

// Launched with twice the threads.
constexpr unsigned kBound = 64;
static __global__ void __launch_bounds__(kBound) too_many_threads() {}
template <typename T>
__global__ void __launch_bounds__(2 * kBound, 1) bound_of_a_template(GlobalPtr<T> out) {
  out[threadIdx.x] = T(1);
}

// A block for each row of out; the product of row and columns is computed in 32 bits.
template <typename Index>
__global__ void narrow_index(GlobalPtr<float> out, Index columns) {
  out[static_cast<Index>(blockIdx.x) * columns + static_cast<Index>(threadIdx.x)] = 1;
}
static __global__ void wide_index(GlobalPtr<float> out, std::int64_t columns) {
  out[blockIdx.x * columns + threadIdx.x] = 1;
}

// x is out: nvcc may load from the read-only cache what is being written.
static __global__ void written_before_read(GlobalPtr<const float> x, GlobalPtr<float> out) {
  out[threadIdx.x] = 1;
  __syncthreads();
  const float other = x[blockDim.x - 1 - threadIdx.x];
  out[blockDim.x + threadIdx.x] = other;
}
static __global__ void read_before_written(GlobalPtr<const float> x, GlobalPtr<float> out) {
  const SharedPtr<const float> mine = x + threadIdx.x;  // inherits the promise
  out[threadIdx.x] = 2 * mine[0];
}

// The batch lies in grid.y, which ends at 65,535.
static __global__ void batch_in_y(GlobalPtr<float> out) {
  out[std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = 1;
}
inline void launch_batch_in_y(
    GlobalPtr<float> out, std::int64_t batch, std::int64_t rows, Stream stream) {
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(batch));
  simt::launch(SIMT_KERNEL(batch_in_y), grid, dim3(1), 0, stream, out);
}

// One thread spins until another one has written.
static __global__ void spin(GlobalPtr<int> flag) {
  if (threadIdx.x == 0) {
    while (flag[0] == 0) {
    }
  } else {
    __syncthreads();
    flag[0] = 1;
  }
}
static __global__ void endless_barriers() {
  for (;;) {
    __syncthreads();
  }
}

// Element 0 of dynamic shared memory, whatever its size is, beside a static array.
static __global__ void use_dynamic_shared(GlobalPtr<float> out) {
  SIMT_DYNAMIC_SHARED(float, workspace);
  SIMT_SHARED_ARRAY(float, one, 1);
  one[0] = 1;
  workspace[0] = one[0];
  out[0] = workspace[0];
}

}  // namespace immunize_ext::selftest
