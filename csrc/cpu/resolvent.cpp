// Resolvents on the CPU: one reduction to tridiagonal form serves every shift (resolvent.inl).

#include "../resolvent.h"

#include <cstring>
#include <vector>

#include "../tensors.h"
#include "full_decomposition.h"
#include "spectrum_kernels.h"

namespace immunize_ext {

using namespace spectrum;

TridiagonalForm cpu_tridiagonal_form(const Tensor& a) {
  const Call call;
  const int64_t batch = a.size(0), t = a.size(-1), ld = padded(t);
  const TridiagonalForm out{
      at::empty({batch, t}, a.options()), at::empty({batch, t}, a.options()),
      at::empty({batch, t, t}, a.options())};
  const double* from = a.const_data_ptr<double>();
  double* diagonal = out.diagonal.mutable_data_ptr<double>();
  double* offdiagonal = out.offdiagonal.mutable_data_ptr<double>();
  double* basis = out.basis.mutable_data_ptr<double>();
  for_each_matrix(batch, t * t * t, [&](int64_t b) {
    std::vector<double> memory(2 * ld * ld + 6 * ld);
    IMMUNIZE_EXT_CHOSEN(tridiagonal_form(
        from + b * t * t, t, diagonal + b * t, offdiagonal + b * t, basis + b * t * t,
        memory.data(), Threads{}));
  });
  return out;
}

ResolventValues cpu_resolvent_values(
    const TridiagonalForm& form,
    const Tensor& shifts,
    const Tensor& vectors,
    const Tensor& definite) {
  const Call call;
  const int64_t batch = shifts.size(0), s = shifts.size(1), t = form.diagonal.size(-1),
                m = vectors.size(-1);
  const ResolventValues out{
      at::empty({batch, s}, shifts.options()), at::empty({batch, s}, shifts.options()),
      at::empty({batch, s, m}, shifts.options())};
  const double* d = form.diagonal.const_data_ptr<double>();
  const double* e = form.offdiagonal.const_data_ptr<double>();
  const double* q = form.basis.const_data_ptr<double>();
  const double* k = shifts.const_data_ptr<double>();
  const double* v = vectors.const_data_ptr<double>();
  double* first = out.first.mutable_data_ptr<double>();
  double* second = out.second.mutable_data_ptr<double>();
  double* energies = out.energies.mutable_data_ptr<double>();
  int64_t* ok = definite.mutable_data_ptr<int64_t>();
  for_each_matrix(batch, t * t * (m + 1) + t * s * (m + 1), [&](int64_t b) {
    std::vector<double> turned(m * t), x(t), inverse(t), below(t);  // rows of turned: basis v_j
    for (int64_t i = 0; i < t; ++i) {
      const double* row = q + (b * t + i) * t;
      for (int64_t j = 0; j < m; ++j) {
        double sum = 0.0;
        for (int64_t l = 0; l < t; ++l)
          sum += row[l] * v[(b * t + l) * m + j];
        turned[j * t + i] = sum;
      }
    }
    for (int64_t which = b * s; which < (b + 1) * s; ++which) {
      ok[which] = IMMUNIZE_EXT_CHOSEN(
          resolvent_traces(t, d + b * t, e + b * t, k[which], first + which, second + which));
      if (ok[which] == 0 || m == 0)
        continue;
      IMMUNIZE_EXT_CHOSEN(
          factor_shifted(t, d + b * t, e + b * t, k[which], inverse.data(), below.data()));
      for (int64_t j = 0; j < m; ++j) {
        std::copy_n(turned.data() + j * t, t, x.data());
        IMMUNIZE_EXT_CHOSEN(solve_vector(t, inverse.data(), below.data(), x.data()));
        double sum = 0.0;
        for (int64_t i = 0; i < t; ++i)
          sum += x[i] * x[i];
        energies[which * m + j] = sum;
      }
    }
  });
  return out;
}

ResolventGradient cpu_resolvent_gradient(
    const ResolventValues& grad,
    const TridiagonalForm& form,
    const Tensor& shifts,
    const Tensor& vectors) {
  const Call call;
  const int64_t batch = shifts.size(0), s = shifts.size(1), t = form.diagonal.size(-1),
                m = vectors.size(-1), blocks = (t + kColumns - 1) / kColumns;
  const Tensor matrix = at::zeros({batch, t, t}, shifts.options());
  const Tensor turned = form.basis.bmm(vectors).mT().contiguous();  // [batch, m, t]
  const Tensor along = at::zeros({batch, m, t}, shifts.options());
  const Tensor of_shifts = at::empty({batch, s}, shifts.options());
  const double* d = form.diagonal.const_data_ptr<double>();
  const double* e = form.offdiagonal.const_data_ptr<double>();
  const double* k = shifts.const_data_ptr<double>();
  const double* g1 = grad.first.const_data_ptr<double>();
  const double* g2 = grad.second.const_data_ptr<double>();
  const double* g3 = grad.energies.const_data_ptr<double>();
  const double* c = turned.const_data_ptr<double>();
  double* out = matrix.mutable_data_ptr<double>();
  double* out_shifts = of_shifts.mutable_data_ptr<double>();
  double* out_vectors = along.mutable_data_ptr<double>();
  for_each_matrix(batch, 20 * s * t * t + t * t, [&](int64_t b) {
    std::vector<double> inverse(s * t), below(s * t), square(s), cube(s), traces(blocks * s * 3);
    for (int64_t l = 0; l < s; ++l) {
      const int64_t which = b * s + l;
      IMMUNIZE_EXT_CHOSEN(factor_shifted(
          t, d + b * t, e + b * t, k[which], inverse.data() + l * t, below.data() + l * t));
      square[l] = (g1[which] + 2.0 * g2[which]) * k[which];
      cube[l] = -2.0 * g2[which] * k[which] * k[which];
      // No weight must hide what the derivative in the shift needs.
      if (square[l] == 0.0 && cube[l] == 0.0 && (g1[which] != 0.0 || g2[which] != 0.0))
        square[l] = std::numeric_limits<double>::min();
    }
    double* lower = out + b * t * t;
    parallel_for(
        blocks, std::max<int64_t>(1, kWorthAThread / (20 * kColumns * t * (s + 1))),
        [&](int64_t begin, int64_t end) {
          std::vector<double> work(t * kColumns);
          IMMUNIZE_EXT_CHOSEN(resolvent_powers(
              t, s, inverse.data(), below.data(), square.data(), cube.data(), begin, end, lower,
              traces.data(), work.data()));
        });
    std::vector<double> x(t), y(t);
    for (int64_t l = 0; l < s; ++l) {
      const int64_t which = b * s + l;
      double sums[3] = {};
      for (int64_t block = 0; block < blocks; ++block)
        for (int power = 0; power < 3; ++power)
          sums[power] += traces[(block * s + l) * 3 + power];
      const double shift = k[which], once = sums[0] - shift * sums[1];
      double total =
          -g1[which] * once - 2.0 * g2[which] * (once - shift * (sums[1] - shift * sums[2]));
      for (int64_t j = 0; j < m; ++j) {
        const double weight = g3[which * m + j];
        if (weight == 0.0)
          continue;
        std::copy_n(c + (b * m + j) * t, t, x.data());
        IMMUNIZE_EXT_CHOSEN(
            solve_vector(t, inverse.data() + l * t, below.data() + l * t, x.data()));
        y = x;
        IMMUNIZE_EXT_CHOSEN(
            solve_vector(t, inverse.data() + l * t, below.data() + l * t, y.data()));
        double product = 0.0;
        for (int64_t i = 0; i < t; ++i) {
          product += x[i] * y[i];
          out_vectors[(b * m + j) * t + i] += 2.0 * weight * y[i];
          for (int64_t h = 0; h <= i; ++h)
            lower[i * t + h] -= weight * (x[i] * y[h] + y[i] * x[h]);
        }
        total -= 2.0 * weight * product;
      }
      out_shifts[which] = total;
    }
    mirror(lower, t, t);
  });
  const OneThread one;
  const Tensor back = form.basis.mT().bmm(matrix).bmm(form.basis);
  return {
      (back + back.mT()) * 0.5,  // a product need not be symmetric
      of_shifts, along.bmm(form.basis).mT()};
}

}  // namespace immunize_ext
