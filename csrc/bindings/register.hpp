// One function for each kernel family; each adds its functions to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace clafusion {

void register_alignment(pybind11::module_& module);
void register_assignment(pybind11::module_& module);
void register_gram(pybind11::module_& module);
void register_moments(pybind11::module_& module);
void register_selection(pybind11::module_& module);
void register_sinkhorn(pybind11::module_& module);
void register_sinkhorn_cuda(pybind11::module_& module);

}  // namespace clafusion
