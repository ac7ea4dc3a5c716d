// The CUDA names that device code may use, for g++. What is missing here does not compile, so that
// a kernel cannot come to rely on what the executor does not model.
#pragma once

#include <math.h>  // not <cmath>: CUDA has these names, with their float overloads, globally

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)

inline const dim3& gridDim = simt::detail::active.grid;
inline const dim3& blockDim = simt::detail::active.block;
inline const uint3& blockIdx = simt::detail::active.block_index;
#define threadIdx (simt::detail::active.current->index)
inline constexpr int warpSize = 32;

namespace simt::detail {

inline std::uint64_t arrive(
    Collective kind, unsigned mask, std::uint64_t value, unsigned source, const Site& site) {
  Arrival arrival;
  arrival.kind = kind;
  arrival.mask = mask;
  arrival.value = value;
  arrival.source = source;
  arrival.site = site;
  return executor.arrive(arrival);
}

// Which lane a shuffle of `width` lanes reads, from the index it would read and its own segment.
struct ShuffleSegment {
  int lane, first, last;
  explicit ShuffleSegment(int width) : lane(static_cast<int>(active.current->lane())) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
      fail("the width of a shuffle must be 1, 2, 4, 8, 16 or 32, got " + std::to_string(width));
    }
    first = lane & ~(width - 1);
    last = first + width - 1;
  }
};

template <typename T>
T shuffle(unsigned mask, const T& value, int source, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "shuffles move numbers");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = arrive(Collective::kShuffle, mask, bits, static_cast<unsigned>(source), site);
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}

template <typename To, typename From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// T, where it must not take part in deduction: atomicAdd(&counts[i], 1).
template <typename T>
struct Same {
  using Type = T;
};
template <typename T>
using SameT = typename Same<T>::Type;

}  // namespace simt::detail

// The place of the call: default arguments are evaluated there.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_HERE      \
  simt::detail::Site { \
    file, line         \
  }

// --- Barriers, votes and fences -----------------------------------------------------------------

inline void __syncthreads(SIMT_SITE) {
  simt::detail::arrive(simt::detail::Collective::kSyncthreads, 0, 0, 0, SIMT_HERE);
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  const auto kind = simt::detail::Collective::kSyncthreadsOr;
  return static_cast<int>(simt::detail::arrive(kind, 0, predicate != 0 ? 1 : 0, 0, SIMT_HERE));
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
  const auto kind = simt::detail::Collective::kSyncthreadsAnd;
  return static_cast<int>(simt::detail::arrive(kind, 0, predicate != 0 ? 1 : 0, 0, SIMT_HERE));
}
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  const auto kind = simt::detail::Collective::kSyncthreadsCount;
  return static_cast<int>(simt::detail::arrive(kind, 0, predicate != 0 ? 1 : 0, 0, SIMT_HERE));
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, SIMT_SITE) {
  simt::detail::arrive(simt::detail::Collective::kSyncwarp, mask, 0, 0, SIMT_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  const auto kind = simt::detail::Collective::kBallot;
  return static_cast<unsigned>(
      simt::detail::arrive(kind, mask, predicate != 0 ? 1 : 0, 0, SIMT_HERE));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  const auto kind = simt::detail::Collective::kAny;
  return static_cast<int>(simt::detail::arrive(kind, mask, predicate != 0 ? 1 : 0, 0, SIMT_HERE));
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  const auto kind = simt::detail::Collective::kAll;
  return static_cast<int>(simt::detail::arrive(kind, mask, predicate != 0 ? 1 : 0, 0, SIMT_HERE));
}
inline void __threadfence() {
  simt::detail::active.fences.back() = simt::detail::active.epoch + 1;
}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() {
  simt::detail::fail("__trap");
}

// --- Shuffles ------------------------------------------------------------------------------------
// A lane outside the segment of `width` lanes is not read: the caller gets its own value back.

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const simt::detail::ShuffleSegment s(width);
  return simt::detail::shuffle(mask, value, s.first + (source & (width - 1)), SIMT_HERE);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const simt::detail::ShuffleSegment s(width);
  const int source = s.lane - static_cast<int>(delta);
  return simt::detail::shuffle(mask, value, source < s.first ? s.lane : source, SIMT_HERE);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const simt::detail::ShuffleSegment s(width);
  const int source = s.lane + static_cast<int>(delta);
  return simt::detail::shuffle(mask, value, source > s.last ? s.lane : source, SIMT_HERE);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_SITE) {
  const simt::detail::ShuffleSegment s(width);
  const int source = s.lane ^ lane_mask;
  return simt::detail::shuffle(mask, value, source > s.last ? s.lane : source, SIMT_HERE);
}

#undef SIMT_SITE
#undef SIMT_HERE

// --- Atomics -------------------------------------------------------------------------------------

#define SIMT_ATOMIC(name, expression)                                                        \
  template <typename T>                                                                      \
  [[gnu::always_inline]] inline T name(simt::Ptr<T> address, simt::detail::SameT<T> value) { \
    return address.atomic_update([&](T old) { return static_cast<T>(expression); });         \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, value > old ? value : old)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicExch, ((void)old, value))
#undef SIMT_ATOMIC

template <typename T>
[[gnu::always_inline]] inline T atomicCAS(
    simt::Ptr<T> address, simt::detail::SameT<T> expected, simt::detail::SameT<T> value) {
  return address.atomic_update([&](T old) { return old == expected ? value : old; });
}

// --- Loads and stores with cache hints -----------------------------------------------------------

template <typename T>
[[gnu::always_inline]] inline std::remove_const_t<T> __ldg(simt::Ptr<T> p) {
  return *p;
}
template <typename T>
[[gnu::always_inline]] inline std::remove_const_t<T> __ldcs(simt::Ptr<T> p) {
  return *p;
}
template <typename T>
[[gnu::always_inline]] inline void __stcs(simt::Ptr<T> p, simt::detail::SameT<T> value) {
  *p = value;
}

// --- Arithmetic ----------------------------------------------------------------------------------
// sqrt, fma, fabs, copysign, hypot, ldexp ... come from math.h; here is what only CUDA has.

inline float rsqrt(float x) {
  return 1.0F / sqrtf(x);
}
inline double rsqrt(double x) {
  return 1.0 / sqrt(x);
}
inline float rsqrtf(float x) {
  return rsqrt(x);
}

#define SIMT_MIN_MAX(T)       \
  constexpr T min(T a, T b) { \
    return b < a ? b : a;     \
  }                           \
  constexpr T max(T a, T b) { \
    return a < b ? b : a;     \
  }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) {
  return fminf(a, b);
}
inline double min(double a, double b) {
  return fmin(a, b);
}
inline float max(float a, float b) {
  return fmaxf(a, b);
}
inline double max(double a, double b) {
  return fmax(a, b);
}

inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __fma_rn(double a, double b, double c) {
  return fma(a, b, c);
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}

inline int __float_as_int(float x) {
  return simt::detail::bit_cast<int>(x);
}
inline float __int_as_float(int x) {
  return simt::detail::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return simt::detail::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return simt::detail::bit_cast<double>(x);
}
