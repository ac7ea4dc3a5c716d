// The launcher of the kernel of the regularizers: instantiated in regularizer_kernels.cu, called in
// regularizer.cpp.
#pragma once

#include "regularizer.cuh"

// `prefix` is empty to instantiate it, extern to declare it.
#define IMMUNIZE_EXT_REGULARIZER_LAUNCHERS(prefix, T) \
  prefix template void launch_regularizer_values<T>(  \
      const Values<T>&, const RegularizerRules&, double, double, std::int64_t, Stream)
