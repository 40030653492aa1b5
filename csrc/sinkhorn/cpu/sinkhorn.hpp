// Entropic optimal transport by Sinkhorn's iteration (Cuturi, NeurIPS 2013).
#pragma once

#include <atomic>
#include <cstdint>

#include "sinkhorn/problem.hpp"
#include "sinkhorn/settings.hpp"

namespace clafusion {

struct SinkhornSolution {
  float* plan;               // (num_source, num_target) = exp((f_i + g_j - C_ij) / epsilon)
  double* source_potential;  // f (num_source), -inf where the weight is 0
  double* target_potential;  // g (num_target), likewise
  double cost;               // sum of plan * cost
  // The mass that the next update of the rows and of the columns would move, as a share of the
  // source's. Balanced: the L1 distance of the plan's marginals from the weights.
  double marginal_error;
  std::int64_t iterations;
  bool converged;
};

// Solves `count` independent problems. The result does not depend on the number of threads, nor on
// the other problems of the call. `stop` is looked at in every iteration: true gives up. Throws
// std::invalid_argument for settings and problems that are not as said where they are declared.
void sinkhorn(const SinkhornProblem* problems, SinkhornSolution* solutions, std::int64_t count,
              const SinkhornSettings& settings, const std::atomic<bool>& stop);

}  // namespace clafusion
