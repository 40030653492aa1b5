// Epsilon annealing (Schmitzer, SIAM J. Sci. Comput. 2019), from the costs' own size down, and what
// follows from an epsilon: decided in one way on the CPU and on a GPU.
#pragma once

#include "common/host_device.hpp"
#include "sinkhorn/settings.hpp"

namespace clafusion {

inline constexpr double kStageFactor = 4.0;
inline constexpr double kStageTolerance = 0.05;

CLAFUSION_HOST_DEVICE double first_epsilon(const SinkhornSettings& settings) {
  double epsilon = settings.epsilon;
  while (epsilon * kStageFactor <= 0.5) epsilon *= kStageFactor;
  return epsilon;
}

// Whether `epsilon` is the one asked for, whatever steps by kStageFactor have rounded.
CLAFUSION_HOST_DEVICE bool is_last_epsilon(const SinkhornSettings& settings, double epsilon) {
  return epsilon < settings.epsilon * 1.0001;
}

// Of the marginal error, at an epsilon on the way or, `last`, the one asked for.
CLAFUSION_HOST_DEVICE double stage_tolerance(const SinkhornSettings& settings, bool last) {
  const bool loose = !last && settings.tolerance < kStageTolerance;
  return loose ? kStageTolerance : settings.tolerance;
}

// The magnitude that epsilon is relative to. Costs that small count as 0: their inverse would
// overflow.
CLAFUSION_HOST_DEVICE double magnitude_of_costs(float largest) {
  return largest < 1e-30f ? 0.0 : static_cast<double>(largest);
}

// What a cost of 1 takes off an exponent to a base whose power `one` is e.
CLAFUSION_HOST_DEVICE float scale_of_costs(double epsilon, double magnitude, double one) {
  return magnitude > 0.0 ? static_cast<float>(one / (epsilon * magnitude)) : 0.0f;
}

// What a potential of 1, as an exponent to base e, is worth, in units of the cost.
CLAFUSION_HOST_DEVICE double unit_of_potentials(double epsilon, double magnitude) {
  return epsilon * (magnitude > 0.0 ? magnitude : 1.0);
}

// Of the update of scalings by the marginals' ratio; 1 for balanced.
CLAFUSION_HOST_DEVICE float update_exponent(const SinkhornSettings& settings, double epsilon) {
  const double rho = settings.marginal_relaxation;
  return settings.balanced() ? 1.0f : static_cast<float>(rho / (rho + epsilon));
}

// `moved` is the mass that the next update of rows and columns would move, where the source's is
// `mass`, or 1 for balanced.
CLAFUSION_HOST_DEVICE double marginal_error(const SinkhornSettings& settings, double moved,
                                            double mass) {
  return settings.balanced() ? moved : moved / mass;
}

}  // namespace clafusion
