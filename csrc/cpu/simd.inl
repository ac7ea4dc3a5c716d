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

#if defined(IMMUNIZE_EXT_VEC8)
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
