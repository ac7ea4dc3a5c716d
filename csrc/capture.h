// Whether the current stream is captured into a CUDA graph, when nothing may wait for the device.

#pragma once

#ifdef IMMUNIZE_EXT_WITH_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace immunize_ext {

inline bool is_capturing() {
#ifdef IMMUNIZE_EXT_WITH_CUDA
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#else
  return false;
#endif
}

}  // namespace immunize_ext
