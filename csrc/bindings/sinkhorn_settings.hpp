// The settings' way from Python, to the CPU and to a GPU.
#pragma once

#include <cstdint>

#include "sinkhorn/settings.hpp"

namespace clafusion {

inline SinkhornSettings sinkhorn_settings(double epsilon, double tolerance,
                                          std::int64_t max_iterations, double marginal_relaxation) {
  const SinkhornSettings settings{epsilon, tolerance, max_iterations, marginal_relaxation};
  require_valid(settings);
  return settings;
}

}  // namespace clafusion
