// The types in which weights are stored, and the type in which the kernels compute with them:
// float16, bfloat16 and float32 in float32, float64 in float64. Conversion happens element by
// element on the way through registers, so there is never a float32 copy of a model.
#pragma once

#include "portable.cuh"

#if defined(__CUDACC__) || defined(IMMUNIZE_EXT_WITH_CUDA)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace immunize_ext {

#if defined(__CUDACC__) || defined(IMMUNIZE_EXT_WITH_CUDA)

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float half_to_float(Half value) {
  return __half2float(value);
}
__device__ __forceinline__ Half float_to_half(float value) {
  return __float2half_rn(value);
}
__device__ __forceinline__ float bfloat16_to_float(BFloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ BFloat16 float_to_bfloat16(float value) {
  return __float2bfloat16_rn(value);
}

#else  // the same roundings for the SIMT executor

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

inline float half_to_float(Half value) {
  return static_cast<float>(simt::detail::bit_cast<_Float16>(value.bits));
}
inline Half float_to_half(float value) {
  return Half{simt::detail::bit_cast<std::uint16_t>(static_cast<_Float16>(value))};
}
inline float bfloat16_to_float(BFloat16 value) {
  return simt::detail::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
inline BFloat16 float_to_bfloat16(float value) {
  const std::uint32_t bits = simt::detail::bit_cast<std::uint32_t>(value);
  if (value != value) {
    return BFloat16{0x7FFF};
  }
  // Half a unit in the last place, less a bit where the kept part is even: ties go to even.
  return BFloat16{static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

#endif

// Storage<T>::Accumulate is what the kernels compute in; widen and narrow convert.
template <typename T>
struct Storage {
  using Accumulate = T;
  static __device__ __forceinline__ T widen(T value) {
    return value;
  }
  static __device__ __forceinline__ T narrow(T value) {
    return value;
  }
};
template <>
struct Storage<Half> {
  using Accumulate = float;
  static __device__ __forceinline__ float widen(Half value) {
    return half_to_float(value);
  }
  static __device__ __forceinline__ Half narrow(float value) {
    return float_to_half(value);
  }
};
template <>
struct Storage<BFloat16> {
  using Accumulate = float;
  static __device__ __forceinline__ float widen(BFloat16 value) {
    return bfloat16_to_float(value);
  }
  static __device__ __forceinline__ BFloat16 narrow(float value) {
    return float_to_bfloat16(value);
  }
};

template <typename T>
using Accumulate = typename Storage<T>::Accumulate;

}  // namespace immunize_ext
