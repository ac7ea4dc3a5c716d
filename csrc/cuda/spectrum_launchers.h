// The launchers of the spectrum kernels: instantiated in spectrum_kernels.cu, called in
// spectrum.cpp.
#pragma once

#include "spectrum_large.cuh"

// `prefix` is empty to instantiate them, extern to declare them.
#define IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(prefix, T)                                                 \
  prefix template bool launch_small_ends<T>(                                                       \
      GlobalPtr<const T>, std::int64_t, const EndsPlan&, const Policy&, const Outputs&,            \
      SharedPtr<double>, GlobalPtr<int>, Stream);                                                  \
  prefix template void launch_small_extremes<T>(                                                   \
      GlobalPtr<const T>, std::int64_t, const SmallPlan&, const Policy&, const Outputs&, bool,     \
      SharedPtr<double>, unsigned, GlobalPtr<int>, Stream);                                        \
  prefix template void launch_small_cluster_gradient<T>(                                           \
      const Incoming&, GlobalPtr<const T>, std::int64_t, const SmallPlan&, const Policy&,          \
      SharedPtr<double>, unsigned, GlobalPtr<T>, Stream);                                          \
  prefix template void launch_gradient<T>(                                                         \
      const Incoming&, GlobalPtr<const T>, std::int64_t, std::int64_t, std::int64_t, GlobalPtr<T>, \
      Stream);                                                                                     \
  prefix template void launch_large_extremes<T>(                                                   \
      GlobalPtr<const T>, std::int64_t, const LargePlan&, const LargeSpace&, const Policy&,        \
      const Outputs&, GlobalPtr<int>, const Watch&, Stream);                                       \
  prefix template void launch_large_cluster_gradient<T>(                                           \
      const Incoming&, GlobalPtr<const T>, std::int64_t, const LargePlan&, const LargeSpace&,      \
      const Policy&, GlobalPtr<T>, const Watch&, Stream)
