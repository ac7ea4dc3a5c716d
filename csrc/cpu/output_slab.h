// Memory for many outputs of one call: one block on huge pages instead of one allocation each.
//
// A merge writes hundreds of megabytes that nobody has touched before. On pages of 4 KiB the faults
// cost more than the arithmetic; pages of 2 MiB make them 512 times rarer. Every tensor has a
// storage of its own, so that it can be saved, resized or freed like any other; the block goes back
// to torch's allocator with the last of them. Nothing is kept between calls.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace immunize_ext {

class OutputSlab {
 public:
  // For `bytes` of outputs in at most `tensors` tensors; below one huge page there is no block.
  OutputSlab(int64_t bytes, int64_t tensors) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes < 2 * kHugePage)
      return;
    const int64_t whole = bytes + tensors * kAlignment;
    block_ = std::make_shared<c10::DataPtr>(c10::GetCPUAllocator()->allocate(whole + kHugePage));
    const auto address = reinterpret_cast<uintptr_t>(block_->get());
    const uintptr_t aligned = (address + kHugePage - 1) / kHugePage * kHugePage;
    next_ = reinterpret_cast<char*>(aligned);
    end_ = next_ + whole;
    // A hint: where the kernel has no huge pages to give, small ones do.
    madvise(next_, whole, MADV_HUGEPAGE);
#endif
  }

  // An uninitialised contiguous tensor.
  at::Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options) {
    const int64_t bytes =
        c10::multiply_integers(shape) * static_cast<int64_t>(options.dtype().itemsize());
    if (block_ == nullptr || bytes == 0 || bytes > end_ - next_)
      return at::empty(shape, options);
    // The storage shares the block; its allocator is torch's, should somebody resize it.
    auto* owner = new std::shared_ptr<c10::DataPtr>(block_);
    c10::DataPtr data(next_, owner, &release, c10::Device(c10::kCPU));
    next_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    c10::Storage storage(
        c10::Storage::use_byte_size_t(), bytes, std::move(data), c10::GetCPUAllocator(),
        /*resizable=*/true);
    return at::empty({0}, options).set_(std::move(storage), 0, shape, {});
  }

 private:
  static constexpr int64_t kHugePage = int64_t{2} << 20;
  static constexpr int64_t kAlignment = 64;  // a cache line, as torch aligns

  static void release(void* owner) {
    delete static_cast<std::shared_ptr<c10::DataPtr>*>(owner);
  }

  std::shared_ptr<c10::DataPtr> block_;
  char* next_ = nullptr;
  char* end_ = nullptr;
};

}  // namespace immunize_ext
