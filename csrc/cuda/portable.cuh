// The names in which device code is written so that nvcc and g++ both compile it.
//
// Under nvcc each is the plain CUDA thing. Under g++ they come from csrc/simt/, which runs the
// kernels on the CPU and checks what they do; csrc/simt/README.md says how to write such a kernel.
//
// The files with torch in them (csrc/cuda/*.cpp) are compiled by g++ as well, with
// IMMUNIZE_EXT_WITH_CUDA: nvcc would read torch's headers once for each architecture, which takes
// longer than the kernels. They see the types and plans of the .cuh files, and call launchers that
// the .cu files instantiate; kernels are only parsed there.
#pragma once

#if !defined(__CUDACC__) && !defined(IMMUNIZE_EXT_WITH_CUDA)

#include "../simt/simt.h"

#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <type_traits>
#include <utility>

#include "../simt/common.h"

#if !defined(__CUDACC__)
#include "host_parse.h"
#endif

namespace simt {

// Memory that kernels get as an argument: aliases nothing else that the kernel writes.
template <typename T>
using GlobalPtr = T* __restrict__;
// Shared memory, or either.
template <typename T>
using SharedPtr = T*;

// The same address as a pointer to U.
template <typename U, typename T>
__host__ __device__ __forceinline__ U* pointer_cast(T* p) {
  return reinterpret_cast<U*>(p);
}

// Whether packs of `bytes` bytes can be read and written at `p`.
template <typename T>
__host__ __device__ __forceinline__ bool is_aligned(const T* p, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

template <int count, typename T>
__device__ __forceinline__ Pack<std::remove_const_t<T>, count> load_pack(T* p) {
  return *reinterpret_cast<const Pack<std::remove_const_t<T>, count>*>(p);
}
template <typename T, int count>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, count>& pack) {
  *reinterpret_cast<Pack<T, count>*>(p) = pack;
}

// Asks for the line of 128 bytes around `p`, which must be readable, to be brought into L2. Nothing
// waits for it, and no register is held until it is there.
template <typename T>
__device__ __forceinline__ void prefetch(const T* p) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

using Stream = cudaStream_t;

// Throws LaunchError for a failed call, and leaves no error state behind.
inline void check(const char* what, cudaError_t status) {
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw LaunchError(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

inline int current_device() {
  int device = 0;
  check("cudaGetDevice", cudaGetDevice(&device));
  return device;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, current_device()));
  return value;
}

// The most shared memory that a block can have on the current device.
inline std::size_t shared_limit(Stream) {
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// How many blocks can run at the same time at least: for kernels whose blocks loop over the work.
inline int multiprocessor_count(Stream) {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// Beyond 48 KiB a kernel has to be allowed its dynamic shared memory. It is allowed all that a block
// of the device can have, once: a limit that followed the shapes could be lowered by another host
// thread between setting it and the launch.
inline void allow_dynamic_shared(const char* name, const void* function) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<const void*, int> key(function, current_device());
  if (allowed.count(key) != 0) {
    return;
  }
  cudaFuncAttributes attributes{};
  check(name, cudaFuncGetAttributes(&attributes, function));
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
                   static_cast<int>(attributes.sharedSizeBytes);
  check(name, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  allowed.insert(key);
}

// Launches on `stream` of the current device.
template <typename... P, typename... A>
void launch(
    const Kernel<P...>& kernel,
    const dim3& grid,
    const dim3& block,
    std::size_t shared_bytes,
    Stream stream,
    const A&... arguments) {
  constexpr std::size_t kSharedByDefault = 48 * 1024;
  if (shared_bytes > kSharedByDefault) {
    allow_dynamic_shared(kernel.name, reinterpret_cast<const void*>(kernel.function));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(kernel.name, cudaLaunchKernelEx(&config, kernel.function, arguments...));
}

}  // namespace simt

// SIMT_SHARED_ARRAY(float, partial, 32): a shared array of 32 floats named partial.
#define SIMT_SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]

// SIMT_DYNAMIC_SHARED(double, workspace): all dynamic shared memory of the block, as doubles.
#define SIMT_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char simt_dynamic_shared[]; \
  const ::simt::SharedPtr<type> name = reinterpret_cast<type*>(simt_dynamic_shared)

#endif

// IMMUNIZE_EXT_LAUNCHER: host functions that are no templates and launch kernels. Under nvcc one
// .cu file holds them, for the .cpp files; the executor includes them where it likes.
#if defined(__CUDACC__)
#define IMMUNIZE_EXT_LAUNCHER
#else
#define IMMUNIZE_EXT_LAUNCHER inline
#endif

// Arrays that are indexed by an unrolled loop live in registers; in a loop, in slow local memory.
#if defined(__CUDACC__)
#define IMMUNIZE_EXT_UNROLL _Pragma("unroll")
#define IMMUNIZE_EXT_UNROLL_BY(count) IMMUNIZE_EXT_PRAGMA(unroll count)
#define IMMUNIZE_EXT_PRAGMA(text) _Pragma(#text)
#else
#define IMMUNIZE_EXT_UNROLL
#define IMMUNIZE_EXT_UNROLL_BY(count)
#endif
