// What the bindings hand to CUDA C++: where to run, and what the elements are.
#pragma once

#include <cstdint>

namespace stellar_fast {

struct Launch {
  int device;        // CUDA ordinal of the tensors
  uintptr_t stream;  // cudaStream_t of torch's current stream on that device
};

enum class Dtype { float32, bfloat16, float16 };

}  // namespace stellar_fast
