// What csrc/cuda/portable.cuh means the same under nvcc and g++.
#pragma once

#include <cstddef>
#include <stdexcept>

namespace simt {

// A launch that CUDA refuses.
class LaunchError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A kernel with its name.
template <typename... P>
struct Kernel {
  const char* name;
  void (*function)(P...);
};
template <typename... P>
Kernel<P...> make_kernel(const char* name, void (*function)(P...)) {
  return Kernel<P...>{name, function};
}

// `count` numbers that are moved by one load or store of up to 16 bytes.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  static_assert(sizeof(T) * count <= 16, "the widest load has 16 bytes");
  T values[count];
};

}  // namespace simt

// SIMT_KERNEL(block_sum<float, 256>): makes the Kernel that simt::launch takes.
#define SIMT_KERNEL(...) ::simt::make_kernel(#__VA_ARGS__, __VA_ARGS__)
