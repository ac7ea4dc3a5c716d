// R_well or R_ill of many matrices from their extremes: a thread each, so that neither the values
// nor the weights of the gradient pass through the host.
#pragma once

#include <cstdint>

#include "../regularizer_values.h"
#include "portable.cuh"

namespace immunize_ext::regularizer {

using simt::GlobalPtr;
using simt::Stream;

constexpr int kThreads = 128;
constexpr std::int64_t kOutOfRange = -1;

// What regularizer.cpp returns for each matrix. weights: of d largest, d smallest and dF, and 1.
template <typename T>
struct Values {
  GlobalPtr<const double> extreme, squared_frobenius;  // [batch]
  GlobalPtr<const std::int64_t> rank;                  // [batch]
  GlobalPtr<std::int64_t> multiplicity;                // [batch], of the extreme
  GlobalPtr<T> value;                                  // [batch]
  GlobalPtr<double> weights;                           // [batch, 4]
};

// Where |S|_F^2 lies outside [least, most] powers of it may leave the range of float64: multiplicity
// becomes kOutOfRange, and the rest has no meaning. It becomes 0 where D vanishes.
template <typename T>
__global__ void __launch_bounds__(kThreads) regularizer_values(
    Values<T> v, RegularizerRules rules, double least, double most, std::int64_t batch) {
  const std::int64_t b = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (b >= batch) {
    return;
  }
  const double extreme = v.extreme[b];
  const double square = v.squared_frobenius[b];
  const std::int64_t rank = v.rank[b];
  const std::int64_t multiplicity = v.multiplicity[b];
  const RegularizerValue found = regularizer_of(rules, extreme, square, rank, multiplicity);
  v.value[b] = static_cast<T>(found.value);
  v.weights[4 * b] = rules.ill ? 0.0 : found.extreme_weight;
  v.weights[4 * b + 1] = rules.ill ? found.extreme_weight : 0.0;
  v.weights[4 * b + 2] = found.norm_weight;
  v.weights[4 * b + 3] = 1.0;
  const bool is_zero = square == 0.0 && rank == 0;
  const bool holds = is_zero || (square >= least && square <= most);
  if (!holds || found.vanishes) {
    v.multiplicity[b] = holds ? 0 : kOutOfRange;
  }
}

template <typename T>
void launch_regularizer_values(
    const Values<T>& values,
    const RegularizerRules& rules,
    double least,
    double most,
    std::int64_t batch,
    Stream stream) {
  if (batch == 0) {
    return;
  }
  const std::int64_t blocks = (batch + kThreads - 1) / kThreads;
  simt::launch(
      SIMT_KERNEL(regularizer_values<T>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
      stream, values, rules, least, most, batch);
}

}  // namespace immunize_ext::regularizer
