// Compiles the precondition kernel; no torch header, see portable.cuh.
#include "precondition_launchers.h"

namespace immunize_ext::precondition {

IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(, float);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(, double);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(, Half);
IMMUNIZE_EXT_PRECONDITION_LAUNCHERS(, BFloat16);

}  // namespace immunize_ext::precondition
