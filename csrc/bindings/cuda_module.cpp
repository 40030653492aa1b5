// The CUDA module's table of contents. It imports where neither a GPU nor a driver is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/register.hpp"
#include "sinkhorn/cuda/sinkhorn.hpp"

namespace {

pybind11::dict build_info() {
  using namespace pybind11::literals;
  return pybind11::dict("architectures"_a = CLAFUSION_CUDA_ARCHITECTURES,
                        "runtime"_a = clafusion::cuda_runtime_version());
}

// The devices' names, and why there are none where there are none.
std::pair<std::vector<std::string>, std::string> devices() {
  std::string reason;
  const int count = clafusion::cuda_device_count(&reason);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back(clafusion::cuda_device_name(i));
  return {names, reason};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA kernels of clafusion. Call them through clafusion._native.";
  module.def("build_info", &build_info);
  module.def("devices", &devices);
  clafusion::register_sinkhorn_cuda(module);
}
