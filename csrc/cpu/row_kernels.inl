// The body of row_kernels.h, by every_set.inl.

// IMMUNIZE_EXT_ROW_BYTES: one register of AVX-512 or AVX, two of SSE or NEON.
template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(IMMUNIZE_EXT_ROW_BYTES)));
  // The same for memory: rows start anywhere. A memcpy instead is split into halves that pass
  // through the stack.
  typedef T unaligned
      __attribute__((vector_size(IMMUNIZE_EXT_ROW_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t width = IMMUNIZE_EXT_ROW_BYTES / sizeof(T);
};

template <typename T>
IMMUNIZE_EXT_INLINE void load(typename Vec<T>::type& v, const T* from) {
  v = *reinterpret_cast<const typename Vec<T>::unaligned*>(from);
}

template <typename T>
IMMUNIZE_EXT_INLINE void store(T* to, const typename Vec<T>::type& v) {
  *reinterpret_cast<typename Vec<T>::unaligned*>(to) = v;
}

// Past the caches: memory that nobody reads soon need not be fetched before it is overwritten.
// `to` is aligned to a vector.
template <typename T>
IMMUNIZE_EXT_INLINE void stream(T* to, const typename Vec<T>::type& v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<typename Vec<T>::type*>(to));
#elif IMMUNIZE_EXT_ROW_BYTES == 64
  typedef float Floats __attribute__((vector_size(64)));
  __builtin_ia32_movntps512(reinterpret_cast<float*>(to), reinterpret_cast<const Floats&>(v));
#elif defined(__AVX__)
  typedef float Floats __attribute__((vector_size(32)));
  __builtin_ia32_movntps256(reinterpret_cast<float*>(to), reinterpret_cast<const Floats&>(v));
#else
  store<T>(to, v);
#endif
}

// By halves: a chain as long as the vector would cost more than the products of a short row.
template <typename T>
IMMUNIZE_EXT_INLINE T horizontal_sum(const typename Vec<T>::type& v) {
  constexpr int64_t w = Vec<T>::width;
  T part[w];
  store<T>(part, v);
#pragma GCC unroll 4
  for (int64_t half = w / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i)
      part[i] += part[i + half];
  return part[0];
}

// Rows of X, or of X - L where L is not null.
template <typename T, int M, int Q, bool Difference>
IMMUNIZE_EXT_INLINE void multiply_transposed_tile(
    const T* x, const T* less, const T* y, int64_t d, T* out, int64_t out_stride) {
  using V = typename Vec<T>::type;
  constexpr int64_t w = Vec<T>::width;
  V acc[M][Q] = {};
  int64_t k = 0;
  for (; k + w <= d; k += w) {
    V b[Q];
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j)
      load<T>(b[j], y + j * d + k);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      V a;
      load<T>(a, x + i * d + k);
      if constexpr (Difference) {
        V l;
        load<T>(l, less + i * d + k);
        a -= l;
      }
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j)
        acc[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) {
      T sum = horizontal_sum<T>(acc[i][j]);
      for (int64_t r = k; r < d; ++r)
        sum += (Difference ? x[i * d + r] - less[i * d + r] : x[i * d + r]) * y[j * d + r];
      out[i * out_stride + j] = sum;
    }
  }
}

template <typename T, int M, bool Difference>
IMMUNIZE_EXT_INLINE void multiply_transposed_rows(
    const T* x, const T* less, const T* y, int64_t q, int64_t d, T* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + 3 <= q; j += 3)
    multiply_transposed_tile<T, M, 3, Difference>(x, less, y + j * d, d, out + j, out_stride);
  if (q - j == 2)
    multiply_transposed_tile<T, M, 2, Difference>(x, less, y + j * d, d, out + j, out_stride);
  if (q - j == 1)
    multiply_transposed_tile<T, M, 1, Difference>(x, less, y + j * d, d, out + j, out_stride);
}

template <typename T, bool Difference>
IMMUNIZE_EXT_INLINE void multiply_transposed_all(
    const T* x,
    const T* less,
    int64_t m,
    const T* y,
    int64_t q,
    int64_t d,
    T* out,
    int64_t out_stride) {
  const auto row = [=](int64_t i) { return Difference ? less + i * d : nullptr; };
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    multiply_transposed_rows<T, 4, Difference>(
        x + i * d, row(i), y, q, d, out + i * out_stride, out_stride);
  for (; i < m; ++i)
    multiply_transposed_rows<T, 1, Difference>(
        x + i * d, row(i), y, q, d, out + i * out_stride, out_stride);
}

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
  if (less != nullptr)
    multiply_transposed_all<T, true>(x, less, m, y, q, d, out, out_stride);
  else
    multiply_transposed_all<T, false>(x, nullptr, m, y, q, d, out, out_stride);
}

template <typename T, int M, int K, bool Stream>
IMMUNIZE_EXT_INLINE void add_product_tile(
    const T* base, T sign, const T* c, int64_t c_stride, int64_t q, const T* y, int64_t d, T* out) {
  using V = typename Vec<T>::type;
  constexpr int64_t w = Vec<T>::width;
  V acc[M][K] = {};
  for (int64_t j = 0; j < q; ++j) {
    V b[K];
#pragma GCC unroll 4
    for (int t = 0; t < K; ++t)
      load<T>(b[t], y + j * d + t * w);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const T coefficient = sign * c[i * c_stride + j];
#pragma GCC unroll 4
      for (int t = 0; t < K; ++t)
        acc[i][t] += b[t] * coefficient;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int t = 0; t < K; ++t) {
      if (base != nullptr) {
        V b;
        load<T>(b, base + i * d + t * w);
        acc[i][t] = b + acc[i][t];
      }
      if constexpr (Stream)
        stream<T>(out + i * d + t * w, acc[i][t]);
      else
        store<T>(out + i * d + t * w, acc[i][t]);
    }
  }
}

template <typename T, int M, bool Stream>
IMMUNIZE_EXT_INLINE void add_product_rows(
    const T* base, T sign, const T* c, int64_t c_stride, int64_t q, const T* y, int64_t d, T* out) {
  constexpr int64_t w = Vec<T>::width;
  int64_t k = 0;
  for (; k + 3 * w <= d; k += 3 * w)
    add_product_tile<T, M, 3, Stream>(
        base ? base + k : nullptr, sign, c, c_stride, q, y + k, d, out + k);
  for (; k + w <= d; k += w)
    add_product_tile<T, M, 1, Stream>(
        base ? base + k : nullptr, sign, c, c_stride, q, y + k, d, out + k);
  for (; k < d; ++k) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < q; ++j)
        sum += sign * c[i * c_stride + j] * y[j * d + k];
      out[i * d + k] = base ? base[i * d + k] + sum : sum;
    }
  }
}

template <typename T, bool Stream>
IMMUNIZE_EXT_INLINE void add_product_all(
    const T* base,
    T sign,
    const T* c,
    int64_t c_stride,
    int64_t m,
    int64_t q,
    const T* y,
    int64_t d,
    T* out) {
  const auto row = [=](int64_t i) { return base ? base + i * d : nullptr; };
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    add_product_rows<T, 4, Stream>(row(i), sign, c + i * c_stride, c_stride, q, y, d, out + i * d);
  for (; i < m; ++i)
    add_product_rows<T, 1, Stream>(row(i), sign, c + i * c_stride, c_stride, q, y, d, out + i * d);
}

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
  const bool aligned =
      reinterpret_cast<uintptr_t>(out) % IMMUNIZE_EXT_ROW_BYTES == 0 && d % Vec<T>::width == 0;
  if (past_caches && aligned)
    add_product_all<T, true>(base, sign, c, c_stride, m, q, y, d, out);
  else
    add_product_all<T, false>(base, sign, c, c_stride, m, q, y, d, out);
}

template <typename T, int Q, int K>
IMMUNIZE_EXT_INLINE void accumulate_product_tile(
    const T* c, int64_t c_stride, int64_t m, const T* x, int64_t d, double* sum) {
  using V = typename Vec<T>::type;
  constexpr int64_t w = Vec<T>::width;
  V acc[Q][K] = {};
  for (int64_t i = 0; i < m; ++i) {
    V b[K];
#pragma GCC unroll 4
    for (int t = 0; t < K; ++t)
      load<T>(b[t], x + i * d + t * w);
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) {
      const T coefficient = c[i * c_stride + j];
#pragma GCC unroll 4
      for (int t = 0; t < K; ++t)
        acc[j][t] += b[t] * coefficient;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < Q; ++j)
#pragma GCC unroll 4
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
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j)
      for (int64_t i = 0; i < m; ++i)
        sum[j * d + k] += c[i * c_stride + j] * x[i * d + k];
}

template <typename T>
void accumulate_product(
    const T* c, int64_t c_stride, int64_t m, int64_t q, const T* x, int64_t d, double* sum) {
  int64_t j = 0;
  for (; j + 4 <= q; j += 4)
    accumulate_product_rows<T, 4>(c + j, c_stride, m, x, d, sum + j * d);
  for (; j < q; ++j)
    accumulate_product_rows<T, 1>(c + j, c_stride, m, x, d, sum + j * d);
}
