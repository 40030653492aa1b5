// Sinkhorn's inner loops, as a team of threads runs them: a block of a GPU, or, for the tests, threads
// of the host or only one.
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
//   peer(), peers(), exchange(), at_peer(pointer, peer) teams that share a problem; exchange() waits
//                                                       for all, at_peer() finds another's memory
// lanes() offers rank(), size(), sum(array), max(array), and meet(): what a lane has read before, another
// may then overwrite. All results are the same on all threads that take part, and come about in
// a fixed order.
#pragma once

#include <cmath>
#include <cstdint>

#include "sinkhorn_control.hpp"

#if defined(__CUDACC__)
#define CLAFUSION_TEAM __device__ __forceinline__
#define CLAFUSION_UNROLL _Pragma("unroll")
#else
#define CLAFUSION_TEAM inline
#define CLAFUSION_UNROLL
#endif

namespace clafusion {

// One problem, its memory where the team can reach it.
struct SinkhornTask {
  const float* cost;  // (num_source, num_target), row-major
  std::int64_t num_source;
  std::int64_t num_target;
  const double* source_weights;
  const double* target_weights;
  const double* initial_potential;  // (num_target) or null
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
inline constexpr float kLeastDot = 9.094947e-13f;       // 2^-40
inline constexpr float kLargestDot = 1.1529215e18f;     // 2^60
inline constexpr float kLeastFactor = 7.8886091e-31f;   // 2^-100
inline constexpr float kMostFactor = 1.2676506e30f;     // 2^100

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

// The target side: (columns) each.
struct Columns {
  const float* target;
  const float* v;  // 0 where the weight is
  int count;
};

struct RowState {
  float source;
  float u;
};

// The row update in the log domain, for one row.
template <class Lanes>
CLAFUSION_TEAM RowState row_afresh(Lanes& lanes, const float* cost, const Columns& columns,
                                   const RowUpdate& update, float weight) {
  float top[1] = {-infinity()};
  for (int j = lanes.rank(); j < columns.count; j += lanes.size()) {
    if (!(columns.v[j] > 0.0f)) continue;
    const float x = multiply_add(-update.scale, cost[j], columns.target[j]);
    top[0] = x > top[0] ? x : top[0];
  }
  lanes.max(top);
  const float source = -top[0];
  float sum[1] = {0.0f};
  for (int j = lanes.rank(); j < columns.count; j += lanes.size()) {
    const float v = columns.v[j];
    if (v > 0.0f) sum[0] += entry(cost[j], update.scale, source, columns.target[j]) * v;
  }
  lanes.sum(sum);
  // Where u would be no number to work with, it becomes part of the potential.
  const float log = log_goal(weight, sum[0], source, update.exponent);
  if (!(std::fabs(log) < 100.0f)) return {source + log, 1.0f};
  return {source, goal(weight, sum[0], source, update.exponent)};
}

// Updates u for up to kRows rows that lie one behind the other, and adds u_i times their entries to
// the columns' sums: to `kept`, where lane l's k-th number is column k * lanes + l's, or, if kWide
// (more columns than that holds), to `sums`. Returns the mass that the plain update would still
// move, on lane 0; 0 on the others.
template <int kRows, int kColumns, bool kWide, class Lanes>
CLAFUSION_TEAM float scale_rows(Lanes& lanes, const float* cost, int rows, const Columns& columns,
                                const RowUpdate& update, const float* weights, float* source,
                                float* u, float (&kept)[kColumns], float* sums) {
  const int width = lanes.size();
  const int step = width * kColumns;
  float w[kRows][kColumns];
  float dot[kRows] = {};
  // What lane 0 writes below is read here, before the lanes meet.
  float shift[kRows];
  float factor[kRows];
  CLAFUSION_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const bool old = r < rows && !update.afresh;
    shift[r] = old ? source[r] : 0.0f;
    factor[r] = old ? u[r] : 0.0f;
  }

  const auto fill_all = [&](int first) {
    CLAFUSION_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int j = first + c * width + lanes.rank();
      const float v = j < columns.count ? columns.v[j] : 0.0f;
      const float target = v > 0.0f ? columns.target[j] : 0.0f;
      CLAFUSION_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t row = r < rows ? r : 0;
        const float x = v > 0.0f ? cost[row * columns.count + j] : 0.0f;
        w[r][c] = v > 0.0f ? entry(x, update.scale, shift[r], target) * v : 0.0f;
      }
    }
  };
  if (!update.afresh) {
    for (int first = 0; first < columns.count; first += step) {
      fill_all(first);
      CLAFUSION_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CLAFUSION_UNROLL
        for (int c = 0; c < kColumns; ++c) dot[r] += w[r][c];
      }
      if constexpr (!kWide) break;
    }
    lanes.sum(dot);
  }

  float moved = 0.0f;
  unsigned afresh = 0;  // a bit for each row whose sum is no number to work with
  CLAFUSION_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float weight = r < rows ? weights[r] : 0.0f;
    const float before = factor[r];
    factor[r] = 0.0f;
    if (!(weight > 0.0f)) continue;
    const float fresh = update.afresh ? 0.0f : goal(weight, dot[r], shift[r], update.exponent);
    if (within(dot[r], kLeastDot, kLargestDot) && within(fresh, kLeastFactor, kMostFactor)) {
      factor[r] = fresh;
      if (update.omega != 1.0f) {
        // By the ratio: its logarithm is small near the solution, so that nothing is lost.
        factor[r] = before * exp2_of(update.omega * log2_of(fresh / before));
        moved += dot[r] * std::fabs(factor[r] - fresh);
      }
    } else {
      afresh |= 1u << r;
    }
  }
  const bool refill = kWide || afresh != 0;
  for (int r = 0; afresh != 0; ++r, afresh >>= 1) {
    if ((afresh & 1u) == 0) continue;
    const RowState found = row_afresh(lanes, cost + static_cast<std::int64_t>(r) * columns.count,
                                      columns, update, weights[r]);
    CLAFUSION_UNROLL
    for (int q = 0; q < kRows; ++q) {  // registers have no index
      if (q != r) continue;
      shift[q] = found.source;
      factor[q] = found.u;
    }
  }

  lanes.meet();
  if (lanes.rank() == 0) {
    CLAFUSION_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      source[r] = shift[r];
      u[r] = factor[r];
    }
  }

  for (int first = 0; first < columns.count; first += step) {
    if (refill) fill_all(first);
    CLAFUSION_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      float mass = 0.0f;
      CLAFUSION_UNROLL
      for (int r = 0; r < kRows; ++r) mass += factor[r] > 0.0f ? factor[r] * w[r][c] : 0.0f;
      if constexpr (kWide) {
        const int j = first + c * width + lanes.rank();
        if (j < columns.count) sums[j] += mass;
      } else {
        kept[c] += mass;
      }
    }
    if constexpr (!kWide) break;
  }
  return lanes.rank() == 0 ? moved : 0.0f;
}

struct ColumnUpdate {
  float next;     // the new v
  float moved;    // the mass that the plain update moves
  bool in_range;
};

// The column's half of the iteration: `mass` is the plan's in this column.
CLAFUSION_TEAM ColumnUpdate scale_column(float mass, float weight, float v, float target,
                                         float exponent, float omega) {
  if (!(weight > 0.0f)) return {0.0f, 0.0f, true};
  float ratio = weight / mass;
  float moved = std::fabs(mass - weight);
  if (exponent != 1.0f) {
    ratio = exp2_of(log_goal(weight, mass / v, target, exponent) - log2_of(v));
    moved = mass * std::fabs(1.0f - ratio);
  }
  const bool in_range =
      within(mass, kLeastFactor, kMostFactor) && within(ratio, kLeastFactor, kMostFactor);
  if (omega != 1.0f) ratio = exp2_of(omega * log2_of(ratio));
  return {v * ratio, moved, in_range};
}

// Takes a new v over, into the potential where it is far from 1.
CLAFUSION_TEAM void take_over(float next, float& v, float& target) {
  if (next > 0.0f && !within(next, 1.0f / kLargestFactor, kLargestFactor)) {
    target += log2_of(next);
    next = 1.0f;
  }
  v = next;
}

// Puts v into the potentials and multiplies them by `ratio`. Balanced potentials may be shifted
// against each other: near 0 float resolves them best.
template <class Team>
CLAFUSION_TEAM void settle_columns(Team& team, float ratio, bool balanced, int count, float* target,
                                   float* v) {
  float found[2] = {0.0f, 0.0f};
  for (int j = team.rank(); j < count; j += team.size()) {
    if (!(v[j] > 0.0f)) continue;
    target[j] = (target[j] + log2_of(v[j])) * ratio;
    v[j] = 1.0f;
    found[0] += target[j];
    found[1] += 1.0f;
  }
  team.sum(found);
  if (!balanced) return;
  const float mean = found[0] / found[1];
  for (int j = team.rank(); j < count; j += team.size()) {
    if (v[j] > 0.0f) target[j] -= mean;
  }
}

// One column's part of the update in the log domain, over some rows: the largest exponent, or, given
// that, the sum.
CLAFUSION_TEAM float column_top(const float* cost, std::int64_t stride, int rows, float scale,
                                const float* source, const float* u) {
  float top = -infinity();
  for (int i = 0; i < rows; ++i) {
    if (!(u[i] > 0.0f)) continue;
    const float x = multiply_add(-scale, cost[i * stride], source[i] + log2_of(u[i]));
    top = x > top ? x : top;
  }
  return top;
}

CLAFUSION_TEAM float column_sum(const float* cost, std::int64_t stride, int rows, float scale,
                                const float* source, const float* u, float top) {
  float sum = 0.0f;
  for (int i = 0; i < rows; ++i) {
    if (!(u[i] > 0.0f)) continue;
    sum += exp2_of(multiply_add(-scale, cost[i * stride], source[i] + log2_of(u[i])) - top);
  }
  return sum;
}

CLAFUSION_TEAM float column_potential(float weight, float top, float sum, float exponent) {
  return exponent * (log2_of(weight) - top - log2_of(sum));
}

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

// The target side at the start.
template <class Team>
CLAFUSION_TEAM void start_columns(Team& team, const SinkhornTask& task,
                                  const SinkhornControl& control, bool balanced, float* weights,
                                  float* target, float* v) {
  const double share = balanced ? control.mass : 1.0;
  const double unit = potential_unit(control);
  const int count = static_cast<int>(task.num_target);
  for (int j = team.rank(); j < count; j += team.size()) {
    weights[j] = static_cast<float>(task.target_weights[j] / share);
    const bool live = weights[j] > 0.0f;
    v[j] = live ? 1.0f : 0.0f;
    const bool warm = live && task.initial_potential != nullptr;
    target[j] = warm ? static_cast<float>(task.initial_potential[j] / unit) : 0.0f;
  }
  settle_columns(team, 1.0f, balanced, count, target, v);
}

// Writes a row of the plan and its potential. Returns this lane's part of the cost.
template <class Lanes>
CLAFUSION_TEAM double write_row(Lanes& lanes, const SinkhornTask& task,
                                const SinkhornControl& control, bool balanced, const float* cost,
                                std::int64_t row, const Columns& columns, float source, float u) {
  const double mass = balanced ? control.mass : 1.0;
  const float factor = u * static_cast<float>(mass);
  double total = 0.0;
  for (int j = lanes.rank(); j < columns.count; j += lanes.size()) {
    const bool live = factor > 0.0f && columns.v[j] > 0.0f;
    const float w =
        live ? entry(cost[j], control.scale, source, columns.target[j]) * columns.v[j] : 0.0f;
    const float p = live ? factor * w : 0.0f;
    task.plan[row * columns.count + j] = p;
    total += static_cast<double>(p) * static_cast<double>(cost[j]);
  }
  if (lanes.rank() == 0) {
    const double potential =
        static_cast<double>(source) + std::log2(mass) + static_cast<double>(log2_of(u));
    task.source_potential[row] = u > 0.0f ? potential * potential_unit(control) : -HUGE_VAL;
  }
  return total;
}

template <class Team>
CLAFUSION_TEAM void write_columns(Team& team, const SinkhornTask& task,
                                  const SinkhornControl& control, const Columns& columns) {
  for (int j = team.rank(); j < columns.count; j += team.size()) {
    const double potential =
        static_cast<double>(columns.target[j]) + static_cast<double>(log2_of(columns.v[j]));
    task.target_potential[j] =
        columns.v[j] > 0.0f ? potential * potential_unit(control) : -HUGE_VAL;
  }
}

CLAFUSION_TEAM void write_outcome(const SinkhornTask& task, const SinkhornControl& control,
                                  double total) {
  const SinkhornStatus status = !control.finite      ? SinkhornStatus::not_finite
                                : control.converged ? SinkhornStatus::converged
                                                    : SinkhornStatus::not_converged;
  *task.total = total;
  *task.error = control.error;
  *task.iterations = control.iterations;
  *task.status = static_cast<std::int64_t>(status);
}

}  // namespace block
}  // namespace clafusion
