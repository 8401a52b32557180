// The Python module stellar_fast._C: plain addresses, sizes and strides; shapes and dtypes are checked by the doors in
// stellar_fast/ops, ranges here.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "build_info/build_info.h"
#include "common/allocator.h"
#include "common/check.h"
#include "crop_resize/crop_resize.h"

namespace py = pybind11;
using namespace stellar_fast;

namespace {

template <typename T>
T *address(uintptr_t value) {
  return reinterpret_cast<T *>(value);
}

py::dict build_info() {
  const CpuInfo cpu = cpu_info();
  py::dict info;
  info["compiler"] = cpu.compiler;
  info["flags"] = cpu.flags;
  info["simd_level"] = cpu.simd_level;
  info["openmp_version"] = cpu.openmp_version;
  info["openmp_library"] = cpu.openmp_library;
#ifdef STELLAR_FAST_CUDA
  const CudaInfo cuda = cuda_info();
  info["cuda_runtime_version"] = cuda.runtime_version;
  info["cuda_architectures"] = cuda.architectures;
  info["cuda_device_count"] = cuda.device_count;
  info["cuda_device_error"] = cuda.device_error;
#endif
  return info;
}

void crop_resize_checked(uintptr_t image, int height, int width, ptrdiff_t row_stride, uintptr_t boxes, uintptr_t flips,
                         int count, int size, uintptr_t out) {
  check(size >= 1, "size must be at least 1 but is ", size);
  const Box *box = address<const Box>(boxes);
  for (int i = 0; i < count; ++i) {
    const Box &b = box[i];
    check(b.height >= 1 && b.width >= 1 && b.top >= 0 && b.left >= 0 && b.height <= height - b.top && b.width <= width - b.left,
          "box ", i, " (top ", b.top, ", left ", b.left, ", height ", b.height, ", width ", b.width,
          ") must lie inside the image, which is ", height, " x ", width);
  }
  const py::gil_scoped_release release;
  crop_resize(address<const uint8_t>(image), row_stride, box, address<const uint8_t>(flips), count, size,
              address<uint8_t>(out));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info);
  module.def("raise_allocator_thresholds", &raise_allocator_thresholds);
  module.def("crop_resize", &crop_resize_checked, py::arg("image"), py::arg("height"), py::arg("width"),
             py::arg("row_stride"), py::arg("boxes"), py::arg("flips"), py::arg("count"), py::arg("size"), py::arg("out"));
}
