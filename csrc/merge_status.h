// What a merge says about a layer. Torch-free: kernels on both devices set it, and
// immunize_ext/ops/merge_problem.py finds words for it.
#pragma once

namespace immunize_ext {

// Merged; a base or target is not finite, or an output asked for is not; the dtype of the weights
// cannot hold the result. Parts of a layer are joined by or.
constexpr int kMerged = 0, kNotFinite = 1, kOverflow = 2;

}  // namespace immunize_ext
