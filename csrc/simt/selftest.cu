// Makes nvcc compile every kernel of selftest.cuh.
#include "selftest.cuh"

namespace immunize_ext::selftest {

template void launch_row_sum<float>(
    GlobalPtr<const float>, GlobalPtr<float>, std::int64_t, std::int64_t, unsigned, Stream);
template void launch_row_sum<double>(
    GlobalPtr<const double>, GlobalPtr<double>, std::int64_t, std::int64_t, unsigned, Stream);
template void launch_transpose<float>(GlobalPtr<const float>, GlobalPtr<float>, int, int, Stream);
template void launch_transpose<double>(
    GlobalPtr<const double>, GlobalPtr<double>, int, int, Stream);
template __global__ void last_block_sum<true>(
    GlobalPtr<const float>, GlobalPtr<float>, GlobalPtr<int>, GlobalPtr<float>);
template __global__ void reverse_warp<true>(GlobalPtr<const float>, GlobalPtr<float>);
template __global__ void bound_of_a_template<float>(GlobalPtr<float>);
template __global__ void narrow_index<int>(GlobalPtr<float>, int);

}  // namespace immunize_ext::selftest
