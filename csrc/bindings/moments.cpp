#include "moments/moments.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

ChannelLayout layout_of(const Floats& x) {
  if (x.ndim() != 3) throw py::value_error("x must have shape (outer, num_channels, inner)");
  require_aligned(x, "x");
  return {x.shape(0), x.shape(1), x.shape(2)};
}

void moments(const Floats& x, Doubles mean, Doubles variance) {
  const ChannelLayout layout = layout_of(x);
  if (mean.size() != layout.channels || variance.size() != layout.channels) {
    throw py::value_error("mean and variance must have one entry for each channel");
  }
  const float* data = x.data();
  double* means = mean.mutable_data();
  double* variances = variance.mutable_data();
  // Safe without the GIL: the arrays are kept alive by this call's arguments.
  const py::gil_scoped_release release;
  channel_moments(data, layout, means, variances);
}

void scaled(const Floats& x, const Floats& scale, const Floats& shift,
            const std::optional<Floats>& other, float low, float high, Floats out) {
  const ChannelLayout layout = layout_of(x);
  if (scale.size() != layout.channels || shift.size() != layout.channels) {
    throw py::value_error("scale and shift must have one entry for each channel");
  }
  if (out.size() != x.size() || (other && other->size() != x.size())) {
    throw py::value_error("other and out must have as many numbers as x");
  }
  require_aligned(out, "out");
  if (other) require_aligned(*other, "other");
  const float* data = x.data();
  float* results = out.mutable_data();
  const Rescaling how{scale.data(), shift.data(), other ? other->data() : nullptr, low, high};
  const py::gil_scoped_release release;
  scale_channels(data, layout, how, results);
}

}  // namespace

void register_moments(py::module_& module) {
  module.def("channel_moments", &moments, py::arg("x").noconvert(), py::arg("mean").noconvert(),
             py::arg("variance").noconvert());
  module.def("scale_channels", &scaled, py::arg("x").noconvert(), py::arg("scale").noconvert(),
             py::arg("shift").noconvert(), py::arg("other").noconvert().none(true), py::arg("low"),
             py::arg("high"), py::arg("out").noconvert());
}

}  // namespace clafusion
