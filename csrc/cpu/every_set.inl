// Includes IMMUNIZE_EXT_KERNELS once for each instruction set (instructions.h), in the namespaces
// baseline, avx2 and avx512 of the one it stands in. IMMUNIZE_EXT_REGISTER_BYTES is what a vector
// register of the set holds. No include guard, on purpose.
//
// The pragmas have to stand around the definitions: a vector type that is lowered for the baseline
// before it is inlined into a function with a target attribute stays lowered, which costs a factor
// of three [measured].

#define IMMUNIZE_EXT_REGISTER_BYTES 16
namespace baseline {
#include IMMUNIZE_EXT_KERNELS
}  // namespace baseline
#undef IMMUNIZE_EXT_REGISTER_BYTES

#if defined(IMMUNIZE_EXT_X86)
#define IMMUNIZE_EXT_REGISTER_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include IMMUNIZE_EXT_KERNELS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef IMMUNIZE_EXT_REGISTER_BYTES

#define IMMUNIZE_EXT_REGISTER_BYTES 64
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#endif
namespace avx512 {
#include IMMUNIZE_EXT_KERNELS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef IMMUNIZE_EXT_REGISTER_BYTES
#endif

#undef IMMUNIZE_EXT_KERNELS
