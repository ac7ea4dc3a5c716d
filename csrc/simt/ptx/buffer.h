// Buffers and devices for the binding files where the launchers are those that nvcc compiled. Knows
// nothing of the executor, whose names for CUDA's types clash with CUDA's own headers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "../../cuda/portable.cuh"
#include "host.h"

namespace simt {

// A namespace of its own: the executor's classes of these names are in the same library.
inline namespace compiled_by_nvcc {

// The stream on which launches go to `device`, which is the current one from now on.
inline Stream on(const Device& device) {
  ptx::set_device(device);
  return nullptr;
}

// As in ../memory.h.
template <typename T>
class Buffer {
 public:
  using Value = std::remove_const_t<T>;

  Buffer(std::string name, std::int64_t n, std::int64_t shift = 0)
      : Buffer(std::move(name), nullptr, n, shift) {}
  Buffer(std::string name, const Value* data, std::int64_t n, std::int64_t shift = 0)
      : name_(std::move(name)),
        size_(n),
        data_(
            static_cast<Value*>(ptx::allocate(
                name_,
                n * kBytes,
                alignof(Value),
                !std::is_const_v<T>,
                static_cast<std::size_t>(shift) * sizeof(Value),
                data))) {}
  Buffer(Buffer&& other) noexcept
      : name_(std::move(other.name_)),
        size_(other.size_),
        data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() {
    if (data_ != nullptr) {
      ptx::release(data_);
    }
  }

  T* ptr() const {
    return data_;
  }
  std::int64_t size() const {
    return size_;
  }
  const std::string& name() const {
    return name_;
  }
  Value* data() {
    return data_;
  }
  const Value* data() const {
    return data_;
  }
  void fill(const Value& value) {
    std::fill_n(data_, size_, value);
    ptx::mark_written(data_, size_ * kBytes);
  }
  bool is_written(std::int64_t i) const {
    return ptx::is_written(data_ + i);
  }
  std::int64_t first_unwritten() const {
    for (std::int64_t i = 0; i < size_; ++i) {
      if (!is_written(i)) {
        return i;
      }
    }
    return -1;
  }

 private:
  static constexpr std::int64_t kBytes = static_cast<std::int64_t>(sizeof(Value));
  std::string name_;
  std::int64_t size_;
  Value* data_;
};

}  // namespace compiled_by_nvcc
}  // namespace simt
