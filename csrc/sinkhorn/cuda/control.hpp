// Each problem's course on a GPU, apart from the arithmetic on matrices: which pass comes next,
// with which epsilon and relaxation, and when to stop.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.hpp"
#include "sinkhorn/annealing.hpp"
#include "sinkhorn/relaxation.hpp"
#include "sinkhorn/settings.hpp"

namespace clafusion {

// What the next pass over the matrix computes.
enum class SinkhornPass : std::int32_t {
  rows_afresh,  // the row update in the log domain: stable from any target potentials
  rows,         // the row update by the sums of the current plan
  column_tops,  // the largest exponents of the columns, before ...
  column_sums,  // ... their sums: the column update in the log domain
  done,
};

// What to do with the columns after a row update.
enum class SinkhornStep : std::int32_t { go_on, next_stage, columns_afresh, stop };

// One problem's progress.
struct SinkhornControl {
  double epsilon = 0.0;    // of this stage, relative to `magnitude`
  double magnitude = 0.0;  // the largest |cost|; 0 where all costs count as 0
  double mass = 1.0;       // of the source weights
  double error = 0.0;
  std::int64_t iterations = 0;
  Relaxation relaxation;
  float scale = 0.0f;     // exponents to base 2 are potential - scale * cost
  float exponent = 1.0f;  // of the unbalanced update; 1 for balanced
  SinkhornPass pass = SinkhornPass::rows_afresh;
  bool final = false;  // the stage of the epsilon asked for
  bool converged = false;
  bool finite = true;  // whether all costs are
};

inline constexpr double kLog2E = 1.4426950408889634;

// What a potential of 1 (to base 2) is worth, in units of the cost.
CLAFUSION_HOST_DEVICE double potential_unit(const SinkhornControl& control) {
  return unit_of_potentials(control.epsilon, control.magnitude) / kLog2E;
}

// Moves to another epsilon; returns what the potentials must be multiplied by.
CLAFUSION_HOST_DEVICE float enter_stage(SinkhornControl& control, const SinkhornSettings& settings,
                                        double epsilon) {
  // The last iteration is kept for the epsilon that was asked for: a plan for another one is no
  // answer, nor is its error.
  control.final =
      is_last_epsilon(settings, epsilon) || control.iterations >= settings.max_iterations - 1;
  if (control.final) epsilon = settings.epsilon;
  const double ratio = control.epsilon > 0.0 ? control.epsilon / epsilon : 1.0;
  control.epsilon = epsilon;
  control.scale = scale_of_costs(epsilon, control.magnitude, kLog2E);
  control.exponent = update_exponent(settings, epsilon);
  control.relaxation = Relaxation{};
  control.pass = SinkhornPass::rows_afresh;
  return static_cast<float>(ratio);
}

// Starts with the largest |cost| (infinite where one is not finite) and the source weights' sum.
CLAFUSION_HOST_DEVICE void start(SinkhornControl& control, const SinkhornSettings& settings,
                                 float largest, double mass, bool warm) {
  control = SinkhornControl{};
  control.finite = largest <= 3.402823466e38f;
  control.mass = mass;
  control.magnitude = magnitude_of_costs(largest);
  enter_stage(control, settings, warm ? settings.epsilon : first_epsilon(settings));
  if (!control.finite) control.pass = SinkhornPass::done;
}

// Judges an iteration: `moved` is the mass that it moved or would move, and `in_range` whether all
// sums were numbers that can be divided by.
CLAFUSION_HOST_DEVICE SinkhornStep judge(SinkhornControl& control, const SinkhornSettings& settings,
                                         double moved, bool in_range) {
  ++control.iterations;
  control.error = marginal_error(settings, moved, control.mass);
  if (!in_range && !settings.balanced()) control.error = HUGE_VAL;
  const std::int64_t most = settings.max_iterations - (control.final ? 0 : 1);
  const bool reached = in_range && control.error <= stage_tolerance(settings, control.final);
  if (reached || control.iterations >= most) {
    control.converged = control.final && reached;
    if (!control.final) return SinkhornStep::next_stage;
    control.pass = SinkhornPass::done;
    return SinkhornStep::stop;
  }
  if (!in_range) {
    control.pass = SinkhornPass::column_tops;
    return SinkhornStep::columns_afresh;
  }
  control.relaxation.observe(control.error);
  control.pass = SinkhornPass::rows;
  return SinkhornStep::go_on;
}

}  // namespace clafusion
