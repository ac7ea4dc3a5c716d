// Vectors of four doubles: one AVX register, two of SSE or NEON. Of eight where a register holds
// them: for the products alone, which is where the time goes.

typedef double Vec4 __attribute__((vector_size(32)));
typedef int64_t Count4 __attribute__((vector_size(32)));
// The same for memory: rows start anywhere. A memcpy instead is split into halves.
typedef double Unaligned4 __attribute__((vector_size(32), aligned(8), may_alias));
typedef float UnalignedFloat4 __attribute__((vector_size(16), aligned(4), may_alias));

__attribute__((always_inline)) inline void load(Vec4& v, const double* from) {
  v = *reinterpret_cast<const Unaligned4*>(from);
}

__attribute__((always_inline)) inline void load(Vec4& v, const float* from) {
  v = __builtin_convertvector(*reinterpret_cast<const UnalignedFloat4*>(from), Vec4);
}

__attribute__((always_inline)) inline void store(double* to, const Vec4& v) {
  *reinterpret_cast<Unaligned4*>(to) = v;
}

__attribute__((always_inline)) inline double horizontal_sum(const Vec4& v) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}

#if IMMUNIZE_EXT_REGISTER_BYTES == 16
// One register where a Vec4 takes two, which arrays of them would leave for memory.
typedef double Vec2 __attribute__((vector_size(16)));
typedef double Unaligned2 __attribute__((vector_size(16), aligned(8), may_alias));

__attribute__((always_inline)) inline void load(Vec2& v, const double* from) {
  v = *reinterpret_cast<const Unaligned2*>(from);
}

__attribute__((always_inline)) inline void store(double* to, const Vec2& v) {
  *reinterpret_cast<Unaligned2*>(to) = v;
}

__attribute__((always_inline)) inline double horizontal_sum(const Vec2& v) {
  return v[0] + v[1];
}
#endif

#if IMMUNIZE_EXT_SHUFFLES
// Rows become columns.
__attribute__((always_inline)) inline void transpose(Vec4& a, Vec4& b, Vec4& c, Vec4& d) {
  const Vec4 even = __builtin_shufflevector(a, b, 0, 4, 2, 6);
  const Vec4 odd = __builtin_shufflevector(a, b, 1, 5, 3, 7);
  const Vec4 even_below = __builtin_shufflevector(c, d, 0, 4, 2, 6);
  const Vec4 odd_below = __builtin_shufflevector(c, d, 1, 5, 3, 7);
  a = __builtin_shufflevector(even, even_below, 0, 1, 4, 5);
  b = __builtin_shufflevector(odd, odd_below, 0, 1, 4, 5);
  c = __builtin_shufflevector(even, even_below, 2, 3, 6, 7);
  d = __builtin_shufflevector(odd, odd_below, 2, 3, 6, 7);
}
#endif

#if IMMUNIZE_EXT_VEC8
typedef double Vec8 __attribute__((vector_size(64)));
typedef double Unaligned8 __attribute__((vector_size(64), aligned(8), may_alias));

__attribute__((always_inline)) inline void load(Vec8& v, const double* from) {
  v = *reinterpret_cast<const Unaligned8*>(from);
}

// Four numbers from each of two places.
__attribute__((always_inline)) inline void load(Vec8& v, const double* low, const double* high) {
  Vec4 a, b;
  load(a, low);
  load(b, high);
  v = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
}

__attribute__((always_inline)) inline void store(double* to, const Vec8& v) {
  *reinterpret_cast<Unaligned8*>(to) = v;
}
#endif
