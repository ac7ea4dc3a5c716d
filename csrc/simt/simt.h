// Lets g++ compile CUDA device code and runs it on the CPU, one fiber per CUDA thread, for tests.
// Device code includes ../cuda/portable.cuh, which comes here under g++. See README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common.h"
#include "cuda_names.h"
#include "executor.h"
#include "memory.h"

namespace simt {

// Shared memory, or either. Under nvcc: T*.
template <typename T>
using SharedPtr = Ptr<T>;

// The same address as a pointer to U.
template <typename U, typename T>
Ptr<U> pointer_cast(Ptr<T> p) {
  return p.template cast<U>();
}

// Whether packs of `bytes` bytes can be read and written at `p`.
template <typename T>
bool is_aligned(Ptr<T> p, std::size_t bytes) {
  return p.address() % bytes == 0;
}

template <int count, typename T>
[[gnu::always_inline]] inline Pack<std::remove_const_t<T>, count> load_pack(Ptr<T> p) {
  return *p.template cast<const Pack<std::remove_const_t<T>, count>>();
}
template <typename T, int count>
[[gnu::always_inline]] inline void store_pack(Ptr<T> p, const Pack<T, count>& pack) {
  *p.template cast<Pack<T, count>>() = pack;
}

// Nothing but a check: what is asked for must be readable.
template <typename T>
[[gnu::always_inline]] inline void prefetch(Ptr<T> p) {
  static_cast<void>(load_pack<1>(p));
}

}  // namespace simt

// SIMT_SHARED_ARRAY(float, partial, 32): a shared array of 32 floats named partial.
#define SIMT_SHARED_ARRAY(type, name, count)                                  \
  static const char name##_declaration = 0;                                   \
  const ::simt::SharedPtr<type> name(                                         \
      ::simt::detail::executor.static_shared(                                 \
          &name##_declaration, #name, sizeof(type) * (count), alignof(type)), \
      0)

// SIMT_DYNAMIC_SHARED(double, workspace): all dynamic shared memory of the block, as doubles.
#define SIMT_DYNAMIC_SHARED(type, name) \
  const ::simt::SharedPtr<type> name(::simt::detail::executor.dynamic_shared(), 0)
