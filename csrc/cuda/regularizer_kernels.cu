// Compiles the kernel of the regularizers; no torch header, see portable.cuh.
#include "regularizer_launchers.h"

namespace immunize_ext::regularizer {

IMMUNIZE_EXT_REGULARIZER_LAUNCHERS(, float);
IMMUNIZE_EXT_REGULARIZER_LAUNCHERS(, double);

}  // namespace immunize_ext::regularizer
