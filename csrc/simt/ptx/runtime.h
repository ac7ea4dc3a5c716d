// What cudart.cpp offers beside the names of CUDA's runtime.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "host.h"
#include "program.h"

namespace simt::ptx {

// Adds programs to those that can be launched.
void add_programs(std::vector<Program> added);

// What the host has set as the limit of dynamic shared memory of each kernel, in order.
std::map<std::string, std::vector<std::size_t>> shared_limits();

// Throws Error for what the kernel does wrong.
void launch_by_name(
    const std::string& name,
    const dim3& grid,
    const dim3& block,
    std::size_t shared_bytes,
    void* const* arguments);

}  // namespace simt::ptx
