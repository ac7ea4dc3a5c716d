// The launchers of the merge kernels per layer: instantiated in merge_kernels.cu and
// merge_kernels_half.cu, called in merge.cpp.
#pragma once

#include "merge.cuh"

// `prefix` is empty to instantiate them, extern to declare them.
#define IMMUNIZE_EXT_MERGE_LAUNCHERS(prefix, T)                                                 \
  prefix template void launch_apply<T>(                                                         \
      const std::vector<ApplyLayer<T>>&, const std::vector<Weight<T>>&, bool, const Shared<T>&, \
      GlobalPtr<const double>, GlobalPtr<int>, GlobalPtr<std::uint64_t>, Stream);               \
  prefix template void launch_backward<T>(                                                      \
      const std::vector<BackwardLayer<T>>&, const std::vector<Gradient<T>>&, const Shared<T>&,  \
      GlobalPtr<std::uint64_t>, Stream);                                                        \
  prefix template void launch_sum<T>(                                                           \
      const std::vector<SumLayer<T>>&, const std::vector<Weight<T>>&, const Shared<T>&,         \
      const SumPlan&, double, GlobalPtr<double>, GlobalPtr<double>, GlobalPtr<std::uint64_t>,   \
      Stream)
