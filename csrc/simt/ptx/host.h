// Buffers of the runtime in cudart.cpp, in terms that clash neither with CUDA's headers nor with the
// executor's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../common.h"

namespace simt::ptx {

// The current device from now on.
void set_device(const Device& device);

// A buffer of global memory, a copy of `data` unless that is null; `shift` bytes off its alignment.
void* allocate(
    const std::string& name,
    std::int64_t bytes,
    std::size_t granule,
    bool writable,
    std::size_t shift,
    const void* data);
void release(const void* address);
void mark_written(const void* address, std::int64_t bytes);
bool is_written(const void* address);

}  // namespace simt::ptx
