// The source side of an iteration: the row updates, and the columns' sums that they leave.
#pragma once

#include <cmath>
#include <cstdint>

#include "sinkhorn/cuda/block.hpp"

namespace clafusion::block {

// The source side at the start. Weights are taken relative to `share`.
template <class Team, class Index>
CLAFUSION_TEAM void start_rows(Team& team, const double* weights, double share, Index count,
                               const Rows& rows) {
  for (Index i = team.rank(); i < count; i += team.size()) {
    rows.weights[i] = static_cast<float>(weights[i] / share);
    rows.source[i] = 0.0f;
    rows.u[i] = 0.0f;
  }
}

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

// The entries of up to kRows rows times v, in registers: lane l's c-th number is of column
// first + c * lanes + l. Rows and columns that are not there are 0, columns without a weight too.
template <int kRows, int kColumns, class Lanes>
CLAFUSION_TEAM void fill_entries(Lanes& lanes, const float* cost, int rows, const Columns& columns,
                                 float scale, const float (&source)[kRows], int first,
                                 float (&entries)[kRows][kColumns]) {
  CLAFUSION_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const int j = first + c * lanes.size() + lanes.rank();
    const float v = j < columns.count ? columns.v[j] : 0.0f;
    const float target = v > 0.0f ? columns.target[j] : 0.0f;
    CLAFUSION_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t row = r < rows ? r : 0;
      const float x = v > 0.0f ? cost[row * columns.count + j] : 0.0f;
      entries[r][c] = v > 0.0f ? entry(x, scale, source[r], target) * v : 0.0f;
    }
  }
}

struct FactorsMoved {
  float moved;      // the mass that the plain update would still move
  unsigned afresh;  // a bit for each row whose sum is no number to work with
};

// Updates the rows' factors by their sums `dot`. A row to be done afresh gets 0.
template <int kRows>
CLAFUSION_TEAM FactorsMoved update_factors(int rows, const float* weights, const RowUpdate& update,
                                           const float (&dot)[kRows], const float (&source)[kRows],
                                           float (&factor)[kRows]) {
  FactorsMoved result{0.0f, 0};
  CLAFUSION_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float weight = r < rows ? weights[r] : 0.0f;
    const float before = factor[r];
    factor[r] = 0.0f;
    if (!(weight > 0.0f)) continue;
    const float fresh = update.afresh ? 0.0f : goal(weight, dot[r], source[r], update.exponent);
    if (within(dot[r], kLeastDot, kLargestDot) && within(fresh, kLeastFactor, kMostFactor)) {
      factor[r] = fresh;
      if (update.omega != 1.0f) {
        // By the ratio: its logarithm is small near the solution, so that nothing is lost.
        factor[r] = before * exp2_of(update.omega * log2_of(fresh / before));
        result.moved += dot[r] * std::fabs(factor[r] - fresh);
      }
    } else {
      result.afresh |= 1u << r;
    }
  }
  return result;
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
  if (!update.afresh) {
    for (int first = 0; first < columns.count; first += step) {
      fill_entries(lanes, cost, rows, columns, update.scale, shift, first, w);
      CLAFUSION_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CLAFUSION_UNROLL
        for (int c = 0; c < kColumns; ++c) dot[r] += w[r][c];
      }
      if constexpr (!kWide) break;
    }
    lanes.sum(dot);
  }

  const FactorsMoved found = update_factors(rows, weights, update, dot, shift, factor);
  unsigned afresh = found.afresh;
  const bool refill = kWide || afresh != 0;
  for (int r = 0; afresh != 0; ++r, afresh >>= 1) {
    if ((afresh & 1u) == 0) continue;
    const RowState state = row_afresh(lanes, cost + static_cast<std::int64_t>(r) * columns.count,
                                      columns, update, weights[r]);
    CLAFUSION_UNROLL
    for (int q = 0; q < kRows; ++q) {  // registers have no index
      if (q != r) continue;
      shift[q] = state.source;
      factor[q] = state.u;
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
    if (refill) fill_entries(lanes, cost, rows, columns, update.scale, shift, first, w);
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
  return lanes.rank() == 0 ? found.moved : 0.0f;
}

}  // namespace clafusion::block
