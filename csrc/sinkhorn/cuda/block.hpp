// What Sinkhorn's inner loops on a GPU share. The loops are in rows.hpp, columns.hpp and
// solution.hpp, as a team of threads runs them: a block of a GPU, or, for the tests, threads of the
// host or only one.
//
// A problem's plan is u_i v_j 2^(source_i + target_j - scale C_ij). The exponentials are computed
// anew in each pass, so nothing but the costs is read from the matrix, potentials may be changed at
// any place at any time, and rounding in them stays the same from iteration to iteration while the
// factors u and v move: the iteration converges to float's last bits.
//
// Row sums and the column sums that follow from them come out of one pass: the exponentials of
// a few rows wait in registers for the rows' sums.
//
// What a team offers:
//   rank(), size(), barrier(), sum(array), max(array)   all its threads
//   group(), groups(), lanes()                          threads that share a row
//   peer(), peers(), exchange(), at_peer(pointer, peer) teams that share a problem
// exchange() waits for all of these teams, at_peer() finds another's memory. lanes() offers rank(),
// size(), sum(array), max(array), and meet(): what a lane has read before, another may then
// overwrite. All results are the same on all threads that take part, and come about in a fixed
// order.
#pragma once

#include <cmath>
#include <cstdint>

#include "sinkhorn/cuda/control.hpp"
#include "sinkhorn/problem.hpp"

#if defined(__CUDACC__)
#define CLAFUSION_TEAM __device__ __forceinline__
#define CLAFUSION_UNROLL _Pragma("unroll")
#else
#define CLAFUSION_TEAM inline
#define CLAFUSION_UNROLL
#endif

namespace clafusion {

// A problem and the places of its solution, all where the team can reach them.
struct SinkhornTask : SinkhornProblem {
  float* plan;
  double* source_potential;
  double* target_potential;
  double* total;
  double* error;
  std::int64_t* iterations;
  std::int64_t* status;  // a SinkhornStatus
};

enum class SinkhornStatus : std::int64_t { not_converged = 0, converged = 1, not_finite = 2 };

namespace block {

// Factors beyond 2^+-17 are absorbed into the potentials; sums beyond these bounds are taken in the
// log domain, since what has underflowed beside them may count.
inline constexpr float kLargestFactor = 131072.0f;
inline constexpr float kLeastDot = 9.094947e-13f;      // 2^-40
inline constexpr float kLargestDot = 1.1529215e18f;    // 2^60
inline constexpr float kLeastFactor = 7.8886091e-31f;  // 2^-100
inline constexpr float kMostFactor = 1.2676506e30f;    // 2^100

CLAFUSION_TEAM float infinity() { return HUGE_VALF; }

// 2^x; 0 where the result would be denormal.
CLAFUSION_TEAM float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

CLAFUSION_TEAM float log2_of(float x) { return std::log2(x); }

// a b + c, rounded in one way wherever it stands: passes must agree on an entry's exponential.
CLAFUSION_TEAM float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

CLAFUSION_TEAM float entry(float cost, float scale, float source, float target) {
  return exp2_of(multiply_add(-scale, cost, source + target));
}

CLAFUSION_TEAM bool within(float x, float low, float high) { return x > low && x < high; }

// log2 of what u must be where the sum over the row is `dot` times u; likewise for columns.
CLAFUSION_TEAM float log_goal(float weight, float dot, float potential, float exponent) {
  const float plain = log2_of(weight) - log2_of(dot);
  return exponent == 1.0f ? plain : exponent * plain + (exponent - 1.0f) * potential;
}

CLAFUSION_TEAM float goal(float weight, float dot, float potential, float exponent) {
  return exponent == 1.0f ? weight / dot : exp2_of(log_goal(weight, dot, potential, exponent));
}

// How a pass updates the rows and, in the same iteration, the columns.
struct RowUpdate {
  float scale;
  float exponent;
  float omega;  // over-relaxation; 1 for plain Sinkhorn
  bool afresh;  // without the old source potentials, in the log domain
};

CLAFUSION_TEAM RowUpdate row_update(const SinkhornControl& control) {
  return {control.scale, control.exponent, static_cast<float>(control.relaxation.omega),
          control.pass == SinkhornPass::rows_afresh};
}

// The target side: (count) each.
struct Columns {
  float* weights;
  float* target;
  float* v;     // 0 where the weight is
  float* next;  // v after an update that waits for its judgement; or the columns' largest exponents
  int count;
};

// The source side of some rows: one for each.
struct Rows {
  float* weights;
  float* source;
  float* u;
};

// |x|, infinite for NaN.
CLAFUSION_TEAM float magnitude(float x) {
  const float size = std::fabs(x);
  return size <= 3.402823466e38f ? size : infinity();
}

template <class Team>
CLAFUSION_TEAM double total_mass(Team& team, const double* weights, std::int64_t count) {
  double mass[1] = {0.0};
  for (std::int64_t i = team.rank(); i < count; i += team.size()) mass[0] += weights[i];
  team.sum(mass);
  return mass[0];
}

}  // namespace block
}  // namespace clafusion
