// The arrays that bindings take, and a check that pybind11's types leave out.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

namespace clafusion {

using Floats = pybind11::array_t<float, pybind11::array::c_style>;
using Doubles = pybind11::array_t<double, pybind11::array::c_style>;
using Integers = pybind11::array_t<std::int64_t, pybind11::array::c_style>;

// Throws ValueError where an array's numbers do not lie at addresses that their type may have.
inline void require_aligned(const pybind11::array& array, const char* name) {
  const auto address = reinterpret_cast<std::uintptr_t>(array.data());
  if (array.size() > 0 && address % static_cast<std::uintptr_t>(array.itemsize()) != 0) {
    throw pybind11::value_error(std::string(name) + " must be aligned");
  }
}

}  // namespace clafusion
