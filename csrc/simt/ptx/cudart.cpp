// A CUDA runtime without a GPU: what the host code that nvcc compiled calls, served by the executor
// and the programs of interpreter.cpp. Linked in place of libcudart, beneath the real launchers.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "address_space.h"
#include "runtime.h"

// csrc/cuda/portable.cuh and nvcc's own code for kernels know these by their C names; the types are
// those of CUDA 13's headers, which cannot be included beside the executor's.
using cudaError_t = int;
constexpr cudaError_t kSuccess = 0, kInvalidValue = 1, kInvalidDeviceFunction = 98, kFault = 700;
struct Dim {
  unsigned x, y, z;
};
struct LaunchConfig {
  Dim grid, block;
  std::size_t shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
struct FunctionAttributes {
  std::size_t shared_bytes;  // the first field of cudaFuncAttributes
};

namespace simt::ptx {
namespace {

// The mangled name of each host function: filled while the library is loaded, in whatever order.
std::unordered_map<const void*, std::string>& functions() {
  static std::unordered_map<const void*, std::string> names;
  return names;
}
std::unordered_map<std::string, Program> programs;  // by mangled name
// cudaFuncSetAttribute, by device and host function.
std::map<std::pair<int, const void*>, std::size_t> allowed_shared;
std::map<std::string, std::vector<std::size_t>> limits_set;  // by mangled name, all so far
Device device;
int device_number = 0;
std::vector<std::size_t> cards;  // the shared memory of each device; numbers are places in it
std::string last_error;

cudaError_t fail(cudaError_t status, const std::string& message) {
  last_error = message;
  return status;
}

const Program* find_program(const void* function) {
  const auto name = functions().find(function);
  if (name == functions().end()) {
    return nullptr;
  }
  const auto program = programs.find(name->second);
  return program == programs.end() ? nullptr : &program->second;
}

// The region at an address that allocate() gave.
std::map<std::uint64_t, std::unique_ptr<detail::Region>>::iterator region_at(const void* address) {
  const auto key = reinterpret_cast<std::uint64_t>(address);
  const auto found = buffers.upper_bound(key);
  if (found == buffers.end() || address_of(*found->second) > key) {
    throw std::out_of_range("no buffer at this address");
  }
  return found;
}

std::string describe(detail::CodeAddress code) {
  if (code <= 0 || static_cast<std::size_t>(code) > lines.size()) {
    return "";
  }
  const Line& line = lines[static_cast<std::size_t>(code) - 1];
  return " (" + line.file + ":" + std::to_string(line.line) + ")";
}

struct Call {
  const Program* program;
  void* const* arguments;
};

}  // namespace

void set_device(const Device& chosen) {
  device = chosen;
  const auto found = std::find(cards.begin(), cards.end(), device.shared_limit);
  device_number = static_cast<int>(found - cards.begin());
  if (found == cards.end()) {
    cards.push_back(device.shared_limit);
  }
}

void* allocate(
    const std::string& name,
    std::int64_t bytes,
    std::size_t granule,
    bool writable,
    std::size_t shift,
    const void* data) {
  auto region = std::make_unique<detail::Region>(
      name, detail::Space::kGlobal, bytes, granule, writable, shift);
  void* const address = region->base;
  if (data != nullptr && bytes > 0) {
    std::memcpy(address, data, static_cast<std::size_t>(bytes));
  }
  // One past the end of an empty buffer, so that it is found and holds nothing.
  const auto end = address_of(*region) + static_cast<std::uint64_t>(bytes > 0 ? bytes : 1);
  buffers[end] = std::move(region);
  if (data != nullptr) {
    mark_written(address, bytes);
  }
  return address;
}

void release(const void* address) {
  for (auto& [name, program] : programs) {
    for (Instruction& i : program.code) {
      if (i.region != nullptr && i.region->base == address) {
        i.region = nullptr;
      }
    }
  }
  buffers.erase(region_at(address));
}

void mark_written(const void* address, std::int64_t bytes) {
  const detail::Region& region = *region_at(address)->second;
  const std::int64_t first = static_cast<const std::byte*>(address) - region.base;
  for (std::int64_t offset = first; region.cells != nullptr && offset < first + bytes;
       offset += static_cast<std::int64_t>(region.granule)) {
    region.cell(offset).written = 1;
  }
}

bool is_written(const void* address) {
  const detail::Region& region = *region_at(address)->second;
  return region.is_written(static_cast<const std::byte*>(address) - region.base);
}

// Runs a program; the message of what it did wrong is last_error.
cudaError_t launch(
    const Program& program,
    const void* key,
    const Dim& grid,
    const Dim& block,
    void* const* arguments,
    std::size_t shared_bytes) {
  if (std::uint64_t{block.x} * block.y * block.z > program.max_threads) {
    return fail(
        kInvalidValue, "a block of " + std::to_string(block.x) + " x " + std::to_string(block.y) +
                           " x " + std::to_string(block.z) + " threads, .maxntid allows " +
                           std::to_string(program.max_threads));
  }
  // Arguments are copied at the launch, as CUDA does.
  std::vector<std::vector<std::uint64_t>> copies;
  std::vector<void*> pointers;
  for (std::size_t p = 0; p < program.parameters.size(); ++p) {
    const auto bytes = static_cast<std::size_t>(program.parameters[p]);
    copies.emplace_back((bytes + 7) / 8);
    std::memcpy(copies.back().data(), arguments[p], bytes);
    pointers.push_back(copies.back().data());
  }
  Call call{&program, pointers.data()};
  const auto body = [](void* data) {
    const Call& made = *static_cast<const Call*>(data);
    run_thread(*made.program, made.arguments);
  };
  Record record;
  record.kernel = program.name;
  record.blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  record.threads = std::uint64_t{block.x} * block.y * block.z;
  record.dynamic_shared = shared_bytes;
  counters.begin(record);
  try {
    detail::executor.launch(
        program.name.c_str(), key, dim3(grid.x, grid.y, grid.z), dim3(block.x, block.y, block.z),
        shared_bytes, device, {body, &call});
  } catch (const std::exception& error) {
    return fail(kFault, error.what());
  }
  counters.end();
  return kSuccess;
}

cudaError_t launch_function(
    const void* function,
    const Dim& grid,
    const Dim& block,
    void* const* arguments,
    std::size_t shared_bytes) {
  const Program* const program = find_program(function);
  if (program == nullptr) {
    const auto name = functions().find(function);
    return fail(
        kInvalidDeviceFunction,
        "no program for " + (name == functions().end() ? "this function" : name->second));
  }
  constexpr std::size_t kByDefault = 48 * 1024;
  const auto allowed = allowed_shared.find({device_number, function});
  const std::size_t limit = allowed == allowed_shared.end() ? kByDefault : allowed->second;
  if (shared_bytes > limit) {
    return fail(
        kInvalidValue, std::to_string(shared_bytes) +
                           " bytes of dynamic shared memory, the kernel "
                           "is allowed " +
                           std::to_string(limit));
  }
  return launch(*program, function, grid, block, arguments, shared_bytes);
}

// Adds programs to those that can be launched.
void add_programs(std::vector<Program> added) {
  detail::describe_code = &describe;
  for (Program& program : added) {
    programs[program.name] = std::move(program);
  }
}

std::map<std::string, std::vector<std::size_t>> shared_limits() {
  return limits_set;
}

void launch_by_name(
    const std::string& name,
    const dim3& grid,
    const dim3& block,
    std::size_t shared_bytes,
    void* const* arguments) {
  const Program& program = programs.at(name);
  if (launch(
          program, &program, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, arguments,
          shared_bytes) != kSuccess) {
    throw Error(last_error);
  }
}

}  // namespace simt::ptx

using namespace simt::ptx;

extern "C" {

// Kernels are announced when the library is loaded; the code in the fat binary is not looked at.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaInitModule(void**) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  functions()[host] = name;
}
cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return kSuccess;
}
unsigned __cudaPushCallConfiguration(Dim, Dim, std::size_t, void*) {
  return 1;  // only <<< >>> needs it, and nothing here is launched so
}
cudaError_t __cudaPopCallConfiguration(Dim*, Dim*, std::size_t*, void*) {
  return kInvalidValue;
}
cudaError_t __cudaLaunchKernel(
    void* kernel, Dim grid, Dim block, void** arguments, std::size_t shared_bytes, void*) {
  return launch_function(kernel, grid, block, arguments, shared_bytes);
}
cudaError_t cudaLaunchKernelExC(
    const LaunchConfig* config, const void* function, void** arguments) {
  return launch_function(function, config->grid, config->block, arguments, config->shared_bytes);
}

cudaError_t cudaGetDevice(int* number) {
  *number = device_number;
  return kSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMultiprocessors = 16, kSharedOptIn = 97;
  if (attribute == kMultiprocessors) {
    *value = device.multiprocessor_count;
  } else if (attribute == kSharedOptIn) {
    *value = static_cast<int>(device.shared_limit);
  } else {
    return fail(kInvalidValue, "device attribute " + std::to_string(attribute));
  }
  return kSuccess;
}
cudaError_t cudaFuncGetAttributes(FunctionAttributes* attributes, const void* function) {
  const Program* const program = find_program(function);
  if (program == nullptr) {
    return fail(kInvalidDeviceFunction, "no program for this function");
  }
  attributes->shared_bytes = 0;
  for (const auto& [name, bytes] : program->shared) {
    attributes->shared_bytes += static_cast<std::size_t>(bytes);
  }
  return kSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, int attribute, int value) {
  constexpr int kMaxDynamicShared = 8;
  if (attribute != kMaxDynamicShared || find_program(function) == nullptr || value < 0 ||
      static_cast<std::size_t>(value) > device.shared_limit) {
    return fail(kInvalidValue, "cudaFuncSetAttribute");
  }
  allowed_shared[{device_number, function}] = static_cast<std::size_t>(value);
  limits_set[find_program(function)->name].push_back(static_cast<std::size_t>(value));
  return kSuccess;
}
cudaError_t cudaGetLastError() {
  return kSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
  return last_error.c_str();
}

}  // extern "C"
