// The compiled module's table of contents.
#include <pybind11/pybind11.h>

#include "bindings/register.hpp"
#include "common/parallel.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled kernels of clafusion. Call them through clafusion._native.";
  module.def("num_threads", &clafusion::num_threads);
  module.def("set_num_threads", &clafusion::set_num_threads, pybind11::arg("count"));
  clafusion::register_gram(module);
  clafusion::register_layer_alignment(module);
  clafusion::register_layer_costs(module);
}
