// Compiles the spectrum kernels; no torch header, see portable.cuh.
#include "spectrum_launchers.h"

namespace immunize_ext::spectrum {

IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(, float);
IMMUNIZE_EXT_SPECTRUM_LAUNCHERS(, double);

}  // namespace immunize_ext::spectrum
