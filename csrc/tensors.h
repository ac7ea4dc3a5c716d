// Shapes, types and scales of tensors: what the operators share on every device.

#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <tuple>
#include <vector>

// Of MKL, which libtorch_cpu brings on x86; null where there is another LAPACK. In small letters the
// name is that for Fortran, which takes an address.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace immunize_ext {

using at::Tensor;

// Decompositions and products of libraries add up in an order that depends on the number of
// threads. While one of these stands, the calls of this thread take one, and the bits of a result
// are the same whatever torch.set_num_threads says.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local != nullptr ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr)
      MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// float32 and float64 pass as they are, half types as float32, which holds them exactly; contiguous.
inline Tensor readable(const Tensor& a) {
  const bool native = a.scalar_type() == at::kDouble || a.scalar_type() == at::kFloat;
  return (native ? a : a.to(at::kFloat)).contiguous();
}

// t, which is nobody else's yet, in another shape: as view() does it, without a call of the
// dispatcher for each of eleven outputs.
inline Tensor shaped(Tensor t, at::IntArrayRef sizes) {
  if (!t.is_contiguous())
    return t.view(sizes);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return t;
}

// t.to(dtype) between float32 and float64. For the few numbers of a small batch on the CPU the
// dispatcher alone would take longer than all of this.
inline Tensor converted(const Tensor& t, at::ScalarType dtype) {
  constexpr int64_t few = 64;
  if (t.scalar_type() == dtype)
    return t;
  const auto simple = [](at::ScalarType type) { return type == at::kDouble || type == at::kFloat; };
  if (!t.is_cpu() || !t.is_contiguous() || t.numel() > few || !simple(dtype) ||
      !simple(t.scalar_type()))
    return t.to(dtype);
  const Tensor out(at::detail::empty_cpu(t.sizes(), dtype));
  if (dtype == at::kDouble)
    std::copy_n(t.const_data_ptr<float>(), t.numel(), out.mutable_data_ptr<double>());
  else
    for (int64_t i = 0; i < t.numel(); ++i)
      out.mutable_data_ptr<float>()[i] = static_cast<float>(t.const_data_ptr<double>()[i]);
  return out;
}

inline at::IntArrayRef batch_shape(const Tensor& a) {
  return a.sizes().slice(0, a.dim() - 2);
}

inline std::vector<int64_t> with_sides(
    at::IntArrayRef batch, std::initializer_list<int64_t> sides) {
  std::vector<int64_t> shape(batch.begin(), batch.end());
  shape.insert(shape.end(), sides.begin(), sides.end());
  return shape;
}

// The power of two that brings the largest magnitude into [1, 2); 1 for zero. Dividing by it is
// exact as long as the quotient is normal, and it is finite for the largest number there is.
inline double power_of_two_scale(double largest) {
  if (largest == 0.0)
    return 1.0;
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent - 1);
}

// The same for each of many.
inline Tensor power_of_two_scale(const Tensor& largest) {
  const Tensor exponent = std::get<1>(at::frexp(largest)), one = at::ones_like(largest);
  return at::where(largest > 0, at::ldexp(one, exponent - 1), one);
}

// t factors^exponent for powers of two: step by step, as the power itself may leave the range where
// the product does not, and infinity times zero is neither.
inline Tensor times_powers(Tensor t, const Tensor& factors, int exponent) {
  const Tensor step = exponent < 0 ? factors.reciprocal() : factors;
  for (int i = 0; i < std::abs(exponent); ++i)
    t = t * step;
  return t;
}

}  // namespace immunize_ext
