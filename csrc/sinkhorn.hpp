// Entropic optimal transport by Sinkhorn's iteration (Cuturi, NeurIPS 2013).
#pragma once

#include <atomic>
#include <cstdint>

namespace clafusion {

struct SinkhornProblem {
  const float* cost;               // (num_source, num_target), row-major, finite
  std::int64_t num_source;
  std::int64_t num_target;
  const double* source_weights;    // (num_source): not negative, with a positive sum
  const double* target_weights;    // (num_target): likewise; balanced: the same sum
  const double* target_potential;  // (num_target) to start from, or null; in units of the cost
};

struct SinkhornSettings {
  double epsilon;              // relative to the problem's largest |cost|
  double tolerance;            // of SinkhornSolution::marginal_error
  std::int64_t max_iterations;
  double marginal_relaxation;  // weight of the marginals' KL, relative as epsilon; inf: balanced
  const std::atomic<bool>* stop = nullptr;  // looked at in every iteration; true gives up
};

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
// the other problems of the call. Throws std::invalid_argument for settings, shapes, weights or
// costs that are not as said above.
void sinkhorn(const SinkhornProblem* problems, SinkhornSolution* solutions, std::int64_t count,
              const SinkhornSettings& settings);

}  // namespace clafusion
