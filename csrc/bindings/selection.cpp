#include "selection/selection.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

using Flags = py::array_t<bool, py::array::c_style>;

void require_shape(const py::array& array, std::initializer_list<std::int64_t> shape,
                   const char* name) {
  require_aligned(array, name);
  if (!std::equal(array.shape(), array.shape() + array.ndim(), shape.begin(), shape.end())) {
    throw py::value_error(std::string(name) + " has another shape than the other arrays ask for");
  }
}

// The logs are (4, capacity * width, features): rows, solved, given and half. The products are
// (features, features), or their sides (2, outputs, features).
void lose(Doubles inverse, const Doubles& products, Doubles blocks, Doubles read, Doubles settled,
          Doubles logs, Flags left, Integers lost, std::int64_t count, double cancelled) {
  if (blocks.ndim() != 3 || blocks.shape(2) < 1) {
    throw py::value_error("blocks must have shape (num_channels, width, width)");
  }
  if (inverse.ndim() != 2) throw py::value_error("inverse must be a square matrix");
  if (logs.ndim() != 3) throw py::value_error("logs must have shape (4, num_rows, num_features)");
  const std::int64_t channels = blocks.shape(0), width = blocks.shape(2);
  const std::int64_t features = inverse.shape(0), rows = logs.shape(1);
  if (features / width < channels) throw py::value_error("inverse is too small for the channels");
  require_shape(inverse, {features, features}, "inverse");
  const std::int64_t outputs = products.ndim() == 3 ? products.shape(1) : 0;
  if (outputs > 0) {
    require_shape(products, {2, outputs, features}, "products");
  } else {
    require_shape(products, {features, features}, "products");
  }
  require_shape(blocks, {channels, width, width}, "blocks");
  require_shape(read, {channels, width, width}, "read");
  require_shape(settled, {channels, width}, "settled");
  require_shape(logs, {4, rows, features}, "logs");
  require_shape(left, {channels}, "left");
  require_shape(lost, {lost.size()}, "lost");
  bool* flags = left.mutable_data();
  const auto there = static_cast<std::int64_t>(std::count(flags, flags + channels, true));
  if (count < 0 || count > std::min({there, rows / width, std::int64_t{lost.size()}})) {
    throw py::value_error("count must not exceed the channels that are left and the room for them");
  }
  double* log = logs.mutable_data();
  const std::int64_t size = rows * features;
  const ChannelLosses of{features,
                         channels,
                         width,
                         outputs,
                         inverse.mutable_data(),
                         products.data(),
                         blocks.mutable_data(),
                         read.mutable_data(),
                         settled.mutable_data(),
                         log,
                         log + size,
                         log + 2 * size,
                         log + 3 * size,
                         flags,
                         lost.mutable_data()};
  // Safe without the GIL: the arrays are kept alive by this call's arguments.
  const py::gil_scoped_release release;
  lose_channels(of, count, cancelled);
}

void keep(Doubles matrix, const Integers& kept) {
  if (matrix.ndim() != 2) throw py::value_error("matrix must be square");
  const std::int64_t size = matrix.shape(0), count = kept.size();
  require_shape(matrix, {size, size}, "matrix");
  require_shape(kept, {count}, "kept");
  const std::int64_t* rows = kept.data();
  for (std::int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= size || (i > 0 && rows[i] <= rows[i - 1])) {
      throw py::value_error("kept must hold rows of the matrix, in ascending order");
    }
  }
  double* numbers = matrix.mutable_data();
  const py::gil_scoped_release release;
  keep_lower(numbers, size, rows, count);
}

}  // namespace

void register_selection(py::module_& module) {
  module.def("lose_channels", &lose, py::arg("inverse").noconvert(),
             py::arg("products").noconvert(), py::arg("blocks").noconvert(),
             py::arg("read").noconvert(), py::arg("settled").noconvert(),
             py::arg("logs").noconvert(), py::arg("left").noconvert(),
             py::arg("lost").noconvert(), py::arg("count"), py::arg("cancelled"));
  module.def("keep_lower", &keep, py::arg("matrix").noconvert(), py::arg("kept").noconvert());
}

}  // namespace clafusion
