// What csrc/cuda/portable.cuh means the same under nvcc and g++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace simt {

// A mistake that the executor found in a kernel while it ran.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A launch that CUDA refuses.
class LaunchError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a test chooses about the simulated device and the launches on it.
struct Device {
  std::uint64_t seed = 0;
  // What a block may have. sm_90: 227 KiB, sm_80: 163 KiB, sm_86 and sm_89: 99 KiB.
  std::size_t shared_limit = std::size_t{227} * 1024;
  int multiprocessor_count = 4;  // small, so that kernels whose blocks loop over the work do loop
  // How many blocks of each launch are run, the last ones of the grid: a grid of billions can then
  // be launched, and 0 only asks whether CUDA would take it.
  std::size_t blocks = kAllBlocks;
  static constexpr std::size_t kAllBlocks = ~std::size_t{0};
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
