// Undefined arithmetic and indices beyond a local array end the thread with an error.
//
// build.py compiles kernels with -fsanitize=signed-integer-overflow,... but links no sanitizer
// runtime: the instrumented code calls the handlers below. Each is given data that begin with the
// place in the source. They must not return, and must not throw either: the compiler takes them for
// nothrow, so the executor leaves the thread by a jump.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "executor.h"

namespace {

struct Place {
  const char* file;
  std::uint32_t line;
  std::uint32_t column;
};

[[noreturn]] void stop(const Place* place, const char* what) {
  const simt::detail::Site site{place->file, static_cast<int>(place->line)};
  const std::string message = std::string(what) + " (" + simt::detail::text(site) + ")";
  if (simt::detail::active.current != nullptr) {
    simt::detail::executor.abort_thread(message);
  }
  std::fprintf(stderr, "simt: on the host: %s\n", message.c_str());
  std::abort();
}

}  // namespace

// The names and signatures are those of libubsan.
#define SIMT_HANDLER(name, what, ...)                                                     \
  extern "C" [[noreturn]] void __ubsan_handle_##name##_abort(Place* place, __VA_ARGS__) { \
    stop(place, what);                                                                    \
  }
SIMT_HANDLER(add_overflow, "signed integer overflow", std::uintptr_t, std::uintptr_t)
SIMT_HANDLER(sub_overflow, "signed integer overflow", std::uintptr_t, std::uintptr_t)
SIMT_HANDLER(mul_overflow, "signed integer overflow", std::uintptr_t, std::uintptr_t)
SIMT_HANDLER(negate_overflow, "signed integer overflow", std::uintptr_t)
SIMT_HANDLER(
    divrem_overflow, "integer division by zero or overflow", std::uintptr_t, std::uintptr_t)
SIMT_HANDLER(
    shift_out_of_bounds,
    "shift by too many bits or of a negative number",
    std::uintptr_t,
    std::uintptr_t)
SIMT_HANDLER(out_of_bounds, "index beyond a local array", std::uintptr_t)
