// How entropic optimal transport is solved, on the CPU and on a GPU alike.
#pragma once

#include <cfloat>
#include <cstdint>

#include "common/host_device.hpp"

namespace clafusion {

struct SinkhornSettings {
  double epsilon;    // relative to the problem's largest |cost|
  double tolerance;  // of the marginal error
  std::int64_t max_iterations;
  double marginal_relaxation;  // weight of the marginals' KL, relative as epsilon; inf: balanced

  CLAFUSION_HOST_DEVICE bool balanced() const { return marginal_relaxation > DBL_MAX; }
};

// Throws std::invalid_argument where epsilon is not a positive number, or another is not positive.
void require_valid(const SinkhornSettings& settings);

}  // namespace clafusion
