// Compiles the merge kernels for float16 and bfloat16 weights.
#include "merge_launchers.h"

namespace immunize_ext::merge {

IMMUNIZE_EXT_MERGE_LAUNCHERS(, Half);
IMMUNIZE_EXT_MERGE_LAUNCHERS(, BFloat16);

}  // namespace immunize_ext::merge
