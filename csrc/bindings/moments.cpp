#include "moments/moments.hpp"

#include <pybind11/numpy.h>

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

void scaled(Floats x, const Floats& scale, const Floats& shift) {
  const ChannelLayout layout = layout_of(x);
  if (scale.size() != layout.channels || shift.size() != layout.channels) {
    throw py::value_error("scale and shift must have one entry for each channel");
  }
  float* data = x.mutable_data();
  const float* scales = scale.data();
  const float* shifts = shift.data();
  const py::gil_scoped_release release;
  scale_channels(data, layout, scales, shifts);
}

}  // namespace

void register_moments(py::module_& module) {
  module.def("channel_moments", &moments, py::arg("x").noconvert(), py::arg("mean").noconvert(),
             py::arg("variance").noconvert());
  module.def("scale_channels", &scaled, py::arg("x").noconvert(), py::arg("scale").noconvert(),
             py::arg("shift").noconvert());
}

}  // namespace clafusion
