// R_well or R_ill of one matrix from its extremes, and the weights of their gradient (derivation:
// regularizer.cpp). Torch-free, for the host and for devices.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define IMMUNIZE_EXT_HOST_DEVICE __host__ __device__
#else
#define IMMUNIZE_EXT_HOST_DEVICE
#endif

namespace immunize_ext {

// What is the same for all matrices of a call.
struct RegularizerRules {
  bool ill;
  double normaliser;  // p or k; 0: the side or the rank
  double floor;       // of D as a fraction of F / (2 k); 0: a D that vanishes is an error
  double side;
  double vanishing;  // the fraction below which D is rounding
};

struct RegularizerValue {
  double value;
  double extreme_weight, norm_weight;  // of d s_max or d s_min, and of dF
  bool vanishes;                       // and no floor is given: held at one, with gradient 0
};

// extreme: s_max for R_well, s_min for R_ill, and its multiplicity.
IMMUNIZE_EXT_HOST_DEVICE inline RegularizerValue regularizer_of(
    const RegularizerRules& rules,
    double extreme,
    double squared_frobenius,
    std::int64_t rank,
    std::int64_t multiplicity) {
  if (!rules.ill) {
    const double width = 2.0 * (rules.normaliser > 0.0 ? rules.normaliser : rules.side);
    return {extreme * extreme / 2.0 - squared_frobenius / width, extreme, -1.0 / width, false};
  }
  const double counted = static_cast<double>(rank < 1 ? 1 : rank);
  const double width = 2.0 * (rules.normaliser > 0.0 ? rules.normaliser : counted);
  const double mean_square = squared_frobenius / width;
  const double denominator = mean_square - extreme * extreme / 2.0;
  const double least = mean_square * (rules.floor > 0.0 ? rules.floor : rules.vanishing);
  // One cluster of all singular values: what D has left of itself is rounding. Zeros that full
  // rank counts are no cluster: D is then F / (2 k).
  const bool one_cluster = extreme > 0.0 && multiplicity >= rank;
  const bool strict = !(rules.normaliser > 0.0) && !(rules.floor > 0.0);
  if (denominator <= least || (one_cluster && strict))
    return {1.0 / least, 0.0, 0.0, !(rules.floor > 0.0)};
  const double inverse = 1.0 / denominator;
  return {inverse, extreme * inverse * inverse, -inverse * inverse / width, false};
}

}  // namespace immunize_ext
