// One function for each kernel family of the CUDA module.
#pragma once

#include <pybind11/pybind11.h>

namespace clafusion {

void register_cuda_sinkhorn(pybind11::module_& module);

}  // namespace clafusion
