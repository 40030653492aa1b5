#include <pybind11/numpy.h>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"
#include "gram/gram.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

void add_gram(const py::array& x, Doubles result, int level) {
  constexpr auto kSize = static_cast<py::ssize_t>(sizeof(float));
  if (!py::isinstance<py::array_t<float>>(x)) throw py::value_error("x must be float32");
  if (x.ndim() != 2) throw py::value_error("x must have shape (num_samples, num_features)");
  if (x.size() > 0 && x.shape(1) > 1 && x.strides(1) != kSize) {
    throw py::value_error("x must hold the features of a sample one behind the other");
  }
  require_aligned(x, "x");
  require_aligned(result, "result");
  if (x.strides(0) % kSize != 0) throw py::value_error("x must be aligned");
  const std::int64_t samples = x.shape(0);
  if (result.ndim() != 2 || result.shape(0) != samples || result.shape(1) > samples) {
    throw py::value_error("result must have shape (num_samples, at most num_samples)");
  }
  const std::int64_t leading = result.shape(1);
  const auto* data = static_cast<const float*>(x.data());
  double* target = result.mutable_data();
  // Safe without the GIL: the arrays are kept alive by this call's arguments.
  const py::gil_scoped_release release;
  gram(data, samples, x.shape(1), x.strides(0) / kSize, leading, target,
       static_cast<SimdLevel>(level));
}

const char* simd_level() {
  constexpr const char* kNames[] = {"automatic", "baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(best_simd_level())];
}

}  // namespace

void register_gram(py::module_& module) {
  module.def("add_gram", &add_gram, py::arg("x").noconvert(), py::arg("result").noconvert(),
             py::arg("level") = 0);
  module.def("simd_level", &simd_level);
}

}  // namespace clafusion
