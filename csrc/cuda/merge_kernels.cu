// Compiles the merge kernels for float32 and float64 weights; no torch header, see portable.cuh.
#include "merge_launchers.h"
#include "merge_solve.cuh"

namespace immunize_ext::merge {

IMMUNIZE_EXT_MERGE_LAUNCHERS(, float);
IMMUNIZE_EXT_MERGE_LAUNCHERS(, double);

}  // namespace immunize_ext::merge
