// Three products between short blocks of rows, the whole arithmetic of the K/V merge. Torch-free.
//
//   multiply_transposed   out  = X Y^T            (m x d) (q x d)^T -> m x q
//   add_product           out  = base + sign C Y  (m x q) (q x d)   -> m x d
//   accumulate_product    sum += C^T X            (m x q)^T (m x d) -> q x d, in float64
//
// m is a block of rows that fits the cache, q a number of prompt tokens, d the text width. Register
// tiles are 4 rows by 3 vectors: 12 accumulators hide the latency of two FMA units and leave room
// for the operands in 16 registers. Sums run in a fixed order, so results do not depend on threads.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && defined(__x86_64__)
#define IMMUNIZE_EXT_AVX2 __attribute__((target("avx2,fma")))
#define IMMUNIZE_EXT_HAS_AVX2 1
#else
#define IMMUNIZE_EXT_AVX2
#define IMMUNIZE_EXT_HAS_AVX2 0
#endif
#define IMMUNIZE_EXT_INLINE inline __attribute__((always_inline))

namespace immunize_ext::rows {

inline bool cpu_has_avx2() {
#if IMMUNIZE_EXT_HAS_AVX2
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
#else
  return false;
#endif
}

// 32 bytes: one AVX register, two of SSE or NEON; the compiler splits it where it has to.
template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(32)));
  static constexpr int64_t width = 32 / sizeof(T);
};

template <typename T>
IMMUNIZE_EXT_INLINE void load(typename Vec<T>::type& v, const T* from) {
  std::memcpy(&v, from, sizeof v);
}

template <typename T>
IMMUNIZE_EXT_INLINE void store(T* to, const typename Vec<T>::type& v) {
  std::memcpy(to, &v, sizeof v);
}

template <typename T>
IMMUNIZE_EXT_INLINE T horizontal_sum(const typename Vec<T>::type& v) {
  T sum = v[0];
  for (int64_t i = 1; i < Vec<T>::width; ++i)
    sum += v[i];
  return sum;
}

template <typename T, int M, int Q>
IMMUNIZE_EXT_INLINE void multiply_transposed_tile(
    const T* x, const T* y, int64_t d, T* out, int64_t out_stride) {
  using V = typename Vec<T>::type;
  constexpr int64_t w = Vec<T>::width;
  V acc[M][Q] = {};
  int64_t k = 0;
  for (; k + w <= d; k += w) {
    V b[Q];
    for (int j = 0; j < Q; ++j)
      load<T>(b[j], y + j * d + k);
    for (int i = 0; i < M; ++i) {
      V a;
      load<T>(a, x + i * d + k);
      for (int j = 0; j < Q; ++j)
        acc[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < Q; ++j) {
      T sum = horizontal_sum<T>(acc[i][j]);
      for (int64_t r = k; r < d; ++r)
        sum += x[i * d + r] * y[j * d + r];
      out[i * out_stride + j] = sum;
    }
  }
}

template <typename T, int M>
IMMUNIZE_EXT_INLINE void multiply_transposed_rows(
    const T* x, const T* y, int64_t q, int64_t d, T* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + 3 <= q; j += 3)
    multiply_transposed_tile<T, M, 3>(x, y + j * d, d, out + j, out_stride);
  if (q - j == 2)
    multiply_transposed_tile<T, M, 2>(x, y + j * d, d, out + j, out_stride);
  if (q - j == 1)
    multiply_transposed_tile<T, M, 1>(x, y + j * d, d, out + j, out_stride);
}

template <typename T>
IMMUNIZE_EXT_INLINE void multiply_transposed_impl(
    const T* x, int64_t m, const T* y, int64_t q, int64_t d, T* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    multiply_transposed_rows<T, 4>(x + i * d, y, q, d, out + i * out_stride, out_stride);
  for (; i < m; ++i)
    multiply_transposed_rows<T, 1>(x + i * d, y, q, d, out + i * out_stride, out_stride);
}

template <typename T, int M, int K>
IMMUNIZE_EXT_INLINE void add_product_tile(
    const T* base, T sign, const T* c, int64_t c_stride, int64_t q, const T* y, int64_t d, T* out) {
  using V = typename Vec<T>::type;
  constexpr int64_t w = Vec<T>::width;
  V acc[M][K] = {};
  for (int64_t j = 0; j < q; ++j) {
    V b[K];
    for (int t = 0; t < K; ++t)
      load<T>(b[t], y + j * d + t * w);
    for (int i = 0; i < M; ++i) {
      const T coefficient = sign * c[i * c_stride + j];
      for (int t = 0; t < K; ++t)
        acc[i][t] += b[t] * coefficient;
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int t = 0; t < K; ++t) {
      if (base != nullptr) {
        V b;
        load<T>(b, base + i * d + t * w);
        acc[i][t] = b + acc[i][t];
      }
      store<T>(out + i * d + t * w, acc[i][t]);
    }
  }
}

template <typename T, int M>
IMMUNIZE_EXT_INLINE void add_product_rows(
    const T* base, T sign, const T* c, int64_t c_stride, int64_t q, const T* y, int64_t d, T* out) {
  constexpr int64_t w = Vec<T>::width;
  int64_t k = 0;
  for (; k + 3 * w <= d; k += 3 * w)
    add_product_tile<T, M, 3>(base ? base + k : nullptr, sign, c, c_stride, q, y + k, d, out + k);
  for (; k + w <= d; k += w)
    add_product_tile<T, M, 1>(base ? base + k : nullptr, sign, c, c_stride, q, y + k, d, out + k);
  for (; k < d; ++k) {
    for (int i = 0; i < M; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < q; ++j)
        sum += sign * c[i * c_stride + j] * y[j * d + k];
      out[i * d + k] = base ? base[i * d + k] + sum : sum;
    }
  }
}

template <typename T>
IMMUNIZE_EXT_INLINE void add_product_impl(
    const T* base,
    T sign,
    const T* c,
    int64_t c_stride,
    int64_t m,
    int64_t q,
    const T* y,
    int64_t d,
    T* out) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    add_product_rows<T, 4>(
        base ? base + i * d : nullptr, sign, c + i * c_stride, c_stride, q, y, d, out + i * d);
  for (; i < m; ++i)
    add_product_rows<T, 1>(
        base ? base + i * d : nullptr, sign, c + i * c_stride, c_stride, q, y, d, out + i * d);
}

template <typename T, int Q, int K>
IMMUNIZE_EXT_INLINE void accumulate_product_tile(
    const T* c, int64_t c_stride, int64_t m, const T* x, int64_t d, double* sum) {
  using V = typename Vec<T>::type;
  constexpr int64_t w = Vec<T>::width;
  V acc[Q][K] = {};
  for (int64_t i = 0; i < m; ++i) {
    V b[K];
    for (int t = 0; t < K; ++t)
      load<T>(b[t], x + i * d + t * w);
    for (int j = 0; j < Q; ++j) {
      const T coefficient = c[i * c_stride + j];
      for (int t = 0; t < K; ++t)
        acc[j][t] += b[t] * coefficient;
    }
  }
  for (int j = 0; j < Q; ++j)
    for (int t = 0; t < K; ++t)
      for (int64_t r = 0; r < w; ++r)
        sum[j * d + t * w + r] += acc[j][t][r];
}

template <typename T, int Q>
IMMUNIZE_EXT_INLINE void accumulate_product_rows(
    const T* c, int64_t c_stride, int64_t m, const T* x, int64_t d, double* sum) {
  constexpr int64_t w = Vec<T>::width;
  int64_t k = 0;
  for (; k + 3 * w <= d; k += 3 * w)
    accumulate_product_tile<T, Q, 3>(c, c_stride, m, x + k, d, sum + k);
  for (; k + w <= d; k += w)
    accumulate_product_tile<T, Q, 1>(c, c_stride, m, x + k, d, sum + k);
  for (; k < d; ++k)
    for (int j = 0; j < Q; ++j)
      for (int64_t i = 0; i < m; ++i)
        sum[j * d + k] += c[i * c_stride + j] * x[i * d + k];
}

template <typename T>
IMMUNIZE_EXT_INLINE void accumulate_product_impl(
    const T* c, int64_t c_stride, int64_t m, int64_t q, const T* x, int64_t d, double* sum) {
  int64_t j = 0;
  for (; j + 4 <= q; j += 4)
    accumulate_product_rows<T, 4>(c + j, c_stride, m, x, d, sum + j * d);
  for (; j < q; ++j)
    accumulate_product_rows<T, 1>(c + j, c_stride, m, x, d, sum + j * d);
}

// Each product once for the baseline instruction set and once with AVX2 and FMA, chosen at run
// time: the build names no architecture, so one binary serves every machine.
template <typename T>
IMMUNIZE_EXT_AVX2 void multiply_transposed_avx2(
    const T* x, int64_t m, const T* y, int64_t q, int64_t d, T* out, int64_t out_stride) {
  multiply_transposed_impl<T>(x, m, y, q, d, out, out_stride);
}
template <typename T>
void multiply_transposed(
    const T* x, int64_t m, const T* y, int64_t q, int64_t d, T* out, int64_t out_stride) {
  if (cpu_has_avx2())
    return multiply_transposed_avx2<T>(x, m, y, q, d, out, out_stride);
  multiply_transposed_impl<T>(x, m, y, q, d, out, out_stride);
}

template <typename T>
IMMUNIZE_EXT_AVX2 void add_product_avx2(
    const T* base,
    T sign,
    const T* c,
    int64_t c_stride,
    int64_t m,
    int64_t q,
    const T* y,
    int64_t d,
    T* out) {
  add_product_impl<T>(base, sign, c, c_stride, m, q, y, d, out);
}
// base may be null (zero), or equal to out.
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
    T* out) {
  if (cpu_has_avx2())
    return add_product_avx2<T>(base, sign, c, c_stride, m, q, y, d, out);
  add_product_impl<T>(base, sign, c, c_stride, m, q, y, d, out);
}

template <typename T>
IMMUNIZE_EXT_AVX2 void accumulate_product_avx2(
    const T* c, int64_t c_stride, int64_t m, int64_t q, const T* x, int64_t d, double* sum) {
  accumulate_product_impl<T>(c, c_stride, m, q, x, d, sum);
}
template <typename T>
void accumulate_product(
    const T* c, int64_t c_stride, int64_t m, int64_t q, const T* x, int64_t d, double* sum) {
  if (cpu_has_avx2())
    return accumulate_product_avx2<T>(c, c_stride, m, q, x, d, sum);
  accumulate_product_impl<T>(c, c_stride, m, q, x, d, sum);
}

}  // namespace immunize_ext::rows
