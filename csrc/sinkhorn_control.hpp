// Sinkhorn's course, apart from the arithmetic on matrices: which epsilon, which relaxation, when to
// stop. The same code for the CPU's solver's relaxation and for each problem on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define CLAFUSION_DEVICE __host__ __device__ inline
#else
#define CLAFUSION_DEVICE inline
#endif

namespace clafusion {

// Over-relaxation (Lehmann, von Renesse, Sambale, Uschmajew, Optim. Lett. 2021), chosen by
// Young's theory as in Hageman and Young, Applied Iterative Methods (1981): where the error
// declines by `rate` an iteration at the relaxation omega, plain iterations would decline it by
// (rate + omega - 1)^2 / (omega^2 rate), and from that follows the best omega.
struct Relaxation {
  double omega = 1.0;
  double start = 0.0, middle = 0.0;
  std::int64_t seen = 0;

  CLAFUSION_DEVICE void observe(double error) {
    // After a change the error first grows, for about 1 / (2 - omega) iterations: only the
    // second half of the window counts.
    const auto half = static_cast<std::int64_t>(4.0 / (2.0 - omega));
    if (seen == 0) start = error;
    if (seen == half) middle = error;
    if (++seen <= 2 * half) return;
    seen = 0;
    const double rate = std::pow(error / middle, 1.0 / static_cast<double>(half));
    // Stuck, in an oscillation or in float's noise, which omega magnifies by 1 / (2 - omega):
    // plain iterations damp both.
    if (!(error < start) || (omega > 1.0 && rate > 1.0 - (2.0 - omega) / 4.0)) {
      omega = 1.0;
    } else if (rate > omega - 1.0 && rate < 1.0) {
      const double root = (rate + omega - 1.0) / omega;
      const double square = root * root / rate;
      const double plain = square < 0.9998 ? square : 0.9998;
      const double best = 2.0 / (1.0 + std::sqrt(1.0 - plain));
      omega = best > omega ? best : omega;
    }
  }
};

// What all problems of a call share; the fields of SinkhornSettings.
struct SinkhornLimits {
  double epsilon;
  double tolerance;
  std::int64_t max_iterations;
  double marginal_relaxation;

  CLAFUSION_DEVICE bool balanced() const { return marginal_relaxation > 1e300; }
};

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
  bool final = false;      // the stage of the epsilon asked for
  bool converged = false;
  bool finite = true;      // whether all costs are
};

// Epsilon annealing (Schmitzer, SIAM J. Sci. Comput. 2019): from the costs' own size down.
inline constexpr double kStageFactor = 4.0;
inline constexpr double kStageTolerance = 0.05;
inline constexpr double kLog2E = 1.4426950408889634;

// What a potential of 1 (to base 2) is worth, in units of the cost.
CLAFUSION_DEVICE double potential_unit(const SinkhornControl& control) {
  return control.epsilon * (control.magnitude > 0.0 ? control.magnitude : 1.0) / kLog2E;
}

// Moves to another epsilon; returns what the potentials must be multiplied by.
CLAFUSION_DEVICE float enter_stage(SinkhornControl& control, const SinkhornLimits& limits,
                                   double epsilon) {
  // The last iteration is kept for the epsilon that was asked for: a plan for another one is no
  // answer, nor is its error.
  control.final =
      epsilon < limits.epsilon * 1.0001 || control.iterations >= limits.max_iterations - 1;
  if (control.final) epsilon = limits.epsilon;
  const double ratio = control.epsilon > 0.0 ? control.epsilon / epsilon : 1.0;
  control.epsilon = epsilon;
  control.scale = control.magnitude > 0.0
                      ? static_cast<float>(kLog2E / (epsilon * control.magnitude))
                      : 0.0f;
  const double rho = limits.marginal_relaxation;
  control.exponent = limits.balanced() ? 1.0f : static_cast<float>(rho / (rho + epsilon));
  control.relaxation = Relaxation{};
  control.pass = SinkhornPass::rows_afresh;
  return static_cast<float>(ratio);
}

// Starts with the largest |cost| (infinite where one is not finite) and the source weights' sum.
CLAFUSION_DEVICE void start(SinkhornControl& control, const SinkhornLimits& limits, float largest,
                            double mass, bool warm) {
  control = SinkhornControl{};
  control.finite = largest <= 3.402823466e38f;
  control.mass = mass;
  // Costs that small count as 0: their inverse would overflow.
  control.magnitude = largest < 1e-30f ? 0.0 : static_cast<double>(largest);
  double epsilon = limits.epsilon;
  while (!warm && epsilon * kStageFactor <= 0.5) epsilon *= kStageFactor;
  enter_stage(control, limits, epsilon);
  if (!control.finite) control.pass = SinkhornPass::done;
}

// Judges an iteration: `moved` is the mass that it moved or would move, and `in_range` whether all
// sums were numbers that can be divided by.
CLAFUSION_DEVICE SinkhornStep judge(SinkhornControl& control, const SinkhornLimits& limits,
                                    double moved, bool in_range) {
  ++control.iterations;
  control.error = limits.balanced() ? moved : moved / control.mass;
  if (!in_range && !limits.balanced()) control.error = HUGE_VAL;
  const std::int64_t most = limits.max_iterations - (control.final ? 0 : 1);
  const bool loose = !control.final && limits.tolerance < kStageTolerance;
  const bool reached = in_range && control.error <= (loose ? kStageTolerance : limits.tolerance);
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
