// A check that pybind11's array types leave out.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

namespace clafusion {

// Throws ValueError where an array's numbers do not lie at addresses that their type may have.
inline void require_aligned(const pybind11::array& array, const char* name) {
  const auto address = reinterpret_cast<std::uintptr_t>(array.data());
  if (array.size() > 0 && address % static_cast<std::uintptr_t>(array.itemsize()) != 0) {
    throw pybind11::value_error(std::string(name) + " must be aligned");
  }
}

}  // namespace clafusion
