#include <cmath>
#include <stdexcept>
#include <string>

#include "sinkhorn/problem.hpp"
#include "sinkhorn/settings.hpp"

namespace clafusion {
namespace {

double sum_of_weights(const double* weights, std::int64_t size, const char* name) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < size; ++i) {
    if (!(weights[i] >= 0.0) || !std::isfinite(weights[i])) {
      throw std::invalid_argument(std::string(name) + " must be finite and not negative");
    }
    sum += weights[i];
  }
  if (!(sum > 0.0)) throw std::invalid_argument(std::string(name) + " must have a positive sum");
  return sum;
}

}  // namespace

void require_valid(const SinkhornSettings& settings) {
  if (!(settings.epsilon > 0.0) || !std::isfinite(settings.epsilon)) {
    throw std::invalid_argument("epsilon must be a positive number");
  }
  if (!(settings.tolerance > 0.0)) throw std::invalid_argument("tolerance must be positive");
  if (settings.max_iterations < 1) throw std::invalid_argument("max_iterations must be positive");
  if (!(settings.marginal_relaxation > 0.0)) {
    throw std::invalid_argument("marginal_relaxation must be positive");
  }
}

void require_shape(std::int64_t num_source, std::int64_t num_target) {
  if (num_source < 1 || num_target < 1) {
    throw std::invalid_argument("a problem needs at least one source and one target");
  }
}

void require_valid(const SinkhornProblem& problem, const SinkhornSettings& settings) {
  require_shape(problem.num_source, problem.num_target);
  const double source =
      sum_of_weights(problem.source_weights, problem.num_source, "source_weights");
  const double target =
      sum_of_weights(problem.target_weights, problem.num_target, "target_weights");
  if (settings.balanced() && std::abs(source - target) > 2e-6 * source) {
    throw std::invalid_argument("source_weights and target_weights must have the same sum");
  }
  if (problem.initial_potential == nullptr) return;
  for (std::int64_t j = 0; j < problem.num_target; ++j) {
    if (problem.target_weights[j] > 0.0 && !std::isfinite(problem.initial_potential[j])) {
      throw std::invalid_argument("the initial potential must be finite");
    }
  }
}

}  // namespace clafusion
