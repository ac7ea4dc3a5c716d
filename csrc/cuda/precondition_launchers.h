// The launcher of the precondition kernel: instantiated in precondition_kernels.cu, called in
// precondition.cpp.
#pragma once

#include "precondition.cuh"

// `prefix` is empty to instantiate it, extern to declare it.
#define IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(prefix, T) \
  prefix template void launch_small_precondition<T>(   \
      GlobalPtr<const T>, GlobalPtr<const double>, GlobalPtr<T>, std::int64_t, int, Stream)
