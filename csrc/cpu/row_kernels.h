// Three products between short blocks of rows, the whole arithmetic of the K/V merge. Torch-free.
//
//   multiply_transposed   out  = (X - L) Y^T      (m x d) (q x d)^T -> m x q; L null for 0
//   add_product           out  = base + sign C Y  (m x q) (q x d)   -> m x d; base null (0) or out
//   accumulate_product    sum += C^T X            (m x q)^T (m x d) -> q x d, in float64
//
// m is a block of rows that fits the cache, q a number of prompt tokens, d the text width. Register
// tiles are 4 rows by 3 vectors: 12 accumulators hide the latency of two FMA units and leave room
// for the operands in 16 registers. Sums run in a fixed order, so results do not depend on threads.
//
// Each product exists for three instruction sets (instructions.h) from one source, with vectors of
// 64 bytes in AVX-512 and of 32 elsewhere: the build names no architecture, so one binary serves
// every machine. Between sets the last bits may differ.

#pragma once

#include <cstdint>

#include "instructions.h"

#define IMMUNIZE_EXT_INLINE inline __attribute__((always_inline))

// Two registers where they hold 16 bytes: the compiler splits what does not fit.
#define IMMUNIZE_EXT_ROW_BYTES (IMMUNIZE_EXT_REGISTER_BYTES == 64 ? 64 : 32)

namespace immunize_ext::rows {

#define IMMUNIZE_EXT_KERNELS "row_kernels.inl"
#include "every_set.inl"

template <typename T>
void multiply_transposed(
    const T* x,
    const T* less,
    int64_t m,
    const T* y,
    int64_t q,
    int64_t d,
    T* out,
    int64_t out_stride) {
  IMMUNIZE_EXT_CHOSEN(multiply_transposed<T>(x, less, m, y, q, d, out, out_stride));
}

// `past_caches`: write around them, where that can be done; finish_writes() before another thread
// reads.
template <typename T>
void add_product(
    const T* base,
    T sign,
    const T* c,
    int64_t c_stride,
    int64_t m,
    int64_t q,
    const T* y,
    int64_t d,
    T* out,
    bool past_caches) {
  IMMUNIZE_EXT_CHOSEN(add_product<T>(base, sign, c, c_stride, m, q, y, d, out, past_caches));
}

template <typename T>
void accumulate_product(
    const T* c, int64_t c_stride, int64_t m, int64_t q, const T* x, int64_t d, double* sum) {
  IMMUNIZE_EXT_CHOSEN(accumulate_product<T>(c, c_stride, m, q, x, d, sum));
}

// Writes past the caches become visible to other threads.
inline void finish_writes() {
#if defined(IMMUNIZE_EXT_X86)
  __builtin_ia32_sfence();
#endif
}

#undef IMMUNIZE_EXT_ROW_BYTES

}  // namespace immunize_ext::rows
