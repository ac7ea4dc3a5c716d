// From an address in the code to the line of source it came from.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <sstream>
#include <string>

#include <dlfcn.h>

namespace simt::detail {

// A return address in this library, relative to a fixed function of it: half the size.
using CodeAddress = std::int32_t;

[[gnu::noinline]] inline void code_anchor() {}

inline CodeAddress code_address(const void* address) {
  return static_cast<CodeAddress>(
      reinterpret_cast<std::intptr_t>(address) - reinterpret_cast<std::intptr_t>(&code_anchor));
}

// Where kernels are no machine code: what `at` shall say of their addresses.
inline std::string (*describe_code)(CodeAddress code) = nullptr;

// " (file:line)" of the kernel code around `code`, by addr2line; empty where it is not installed.
// Of the chain of inlined functions the first that does not belong to the executor is meant.
inline std::string at(CodeAddress code) {
  if (describe_code != nullptr) {
    return describe_code(code);
  }
  const std::intptr_t address = reinterpret_cast<std::intptr_t>(&code_anchor) + code - 1;
  Dl_info library;
  if (code == 0 || dladdr(reinterpret_cast<void*>(address), &library) == 0) {
    return "";
  }
  std::ostringstream command;
  command << "addr2line -i -e '" << library.dli_fname << "' 0x" << std::hex
          << address - reinterpret_cast<std::intptr_t>(library.dli_fbase) << " 2>/dev/null";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.str().c_str(), "r"), pclose);
  char line[4096];
  while (pipe != nullptr && std::fgets(line, sizeof line, pipe.get()) != nullptr) {
    const std::string place(line, std::string(line).find_first_of(" \n"));
    const std::string name = place.substr(place.find_last_of('/') + 1);
    const bool executor =
        place.find("/csrc/simt/") != std::string::npos && name.find(".h:") != std::string::npos;
    if (!executor && name.find('?') == std::string::npos) {
      return " (" + name + ")";
    }
  }
  return "";
}

}  // namespace simt::detail
