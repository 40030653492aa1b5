// What entropic optimal transport is asked for, on the CPU and on a GPU alike.
#pragma once

#include <cstdint>

#include "sinkhorn/settings.hpp"

namespace clafusion {

struct SinkhornProblem {
  const float* cost;  // (num_source, num_target), row-major, finite
  std::int64_t num_source;
  std::int64_t num_target;
  const double* source_weights;     // (num_source): not negative, with a positive sum
  const double* target_weights;     // (num_target): likewise; balanced: the same sum
  const double* initial_potential;  // (num_target), the targets', or null; in units of the cost
};

// Throws std::invalid_argument where a side is empty.
void require_shape(std::int64_t num_source, std::int64_t num_target);

// Throws std::invalid_argument where weights or potentials, which the host can read, are not as
// said above.
void require_valid(const SinkhornProblem& problem, const SinkhornSettings& settings);

}  // namespace clafusion
