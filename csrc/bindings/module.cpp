// The compiled module's table of contents.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/register.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"

namespace {

std::string compiler() {
#if defined(__clang__)
  return __VERSION__;
#elif defined(__GNUC__)
  return std::string("GCC ") + __VERSION__;
#elif defined(_MSC_VER)
  return "MSVC " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  using namespace pybind11::literals;
#if defined(__SANITIZE_ADDRESS__)
  const bool sanitized = true;
#else
  const bool sanitized = false;
#endif
  return pybind11::dict("compiler"_a = compiler(), "simd"_a = clafusion::simd::level(),
                        "threads"_a = clafusion::num_threads(), "sanitized"_a = sanitized);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled kernels of clafusion. Call them through clafusion._native.";
  module.def("build_info", &build_info);
  module.def("num_threads", &clafusion::num_threads);
  module.def("set_num_threads", &clafusion::set_num_threads, pybind11::arg("count"));
  clafusion::register_alignment(module);
  clafusion::register_assignment(module);
  clafusion::register_gram(module);
  clafusion::register_moments(module);
  clafusion::register_selection(module);
  clafusion::register_sinkhorn(module);
}
