// Q = C_reg^T C_reg for the merge on the CPU, in float64 whatever C_reg is.
//
// A BLAS product of a matrix with itself computes both triangles, and takes float64 alone: a wide
// copy of C_reg has to pass through memory first. Here tiles on and below the diagonal are summed
// from panels that are widened as they are packed. Sums run over blocks of 128 rows in order, so no
// bit depends on the number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "full_decomposition.h"
#include "spectrum_kernels.h"

namespace immunize_ext {
namespace {

using namespace spectrum;

template <typename T>
void fill_gram(const T* rows, int64_t m, int64_t d, double* g) {
  const Thin<T> thin{rows, m, d, /*columns=*/true};
  // A slice of units below about 1e6 operations is not worth a thread.
  const int64_t grain = std::max<int64_t>(1, 10000 / std::max<int64_t>(m, 1));
  at::parallel_for(0, symmetric_units(d), grain, [&](int64_t begin, int64_t end) {
    std::vector<double> packed(padded(d) * kDepth);
    IMMUNIZE_EXT_CHOSEN(add_symmetric_product(thin, begin, end, packed.data(), g));
  });
}

Tensor merge_gram(const Tensor& c_reg, int64_t) {  // [m, d]; panels are widened as they are packed
  constexpr const char* op = "merge_gram";
  check_real_floating(op, "c_reg", c_reg);
  TORCH_CHECK_VALUE(
      c_reg.dim() == 2 && c_reg.size(1) > 0, op, ": c_reg must have shape [m, d] with d >= 1, got ",
      c_reg.sizes());
  const int64_t m = c_reg.size(0), d = c_reg.size(1), ld = padded(d);
  const Tensor rows = readable(c_reg);
  const Tensor gram = at::zeros({ld, ld}, rows.options().dtype(at::kDouble));
  double* g = gram.mutable_data_ptr<double>();
  if (rows.scalar_type() == at::kDouble)
    fill_gram(rows.const_data_ptr<double>(), m, d, g);
  else
    fill_gram(rows.const_data_ptr<float>(), m, d, g);
  mirror(g, d, ld);
  return gram.slice(0, 0, d).slice(1, 0, d).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("merge_gram", &merge_gram);
}

}  // namespace immunize_ext
