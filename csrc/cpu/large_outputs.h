// Uninitialised tensors on the CPU, from the pool (pool.h) where they are large.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>

#include <vector>

#include "pool.h"

namespace immunize_ext {

// Contiguous. A storage of its own that can be resized, shared and saved like any other.
inline at::Tensor empty_large(at::IntArrayRef shape, at::ScalarType dtype) {
  const at::TensorOptions options = at::TensorOptions().dtype(dtype);
  const int64_t bytes =
      c10::multiply_integers(shape) * static_cast<int64_t>(c10::elementSize(dtype));
  if (bytes < pool::kSmallest || !pool::enabled())
    return at::empty(shape, options);
  pool::Block* const block = pool::acquire(bytes);
  c10::Storage storage(
      c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), bytes,
          c10::DataPtr(
              block->memory, block,
              [](void* context) { pool::release(static_cast<pool::Block*>(context)); }, at::kCPU),
          c10::GetCPUAllocator(), /*resizable=*/true));
  return at::empty({0}, options).set_(std::move(storage), 0, shape);
}

// One for each of `like`, with another last side.
inline std::vector<at::Tensor> empty_large_like(
    const std::vector<at::Tensor>& like, int64_t columns, at::ScalarType dtype) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& t : like) {
    std::vector<int64_t> shape = t.sizes().vec();
    shape.back() = columns;
    result.push_back(empty_large(shape, dtype));
  }
  return result;
}

}  // namespace immunize_ext
