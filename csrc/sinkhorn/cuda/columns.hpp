// The target side of an iteration: the column updates, and what becomes of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "sinkhorn/cuda/block.hpp"

namespace clafusion::block {

struct ColumnUpdate {
  float next;   // the new v
  float moved;  // the mass that the plain update moves
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

// What the updates of some columns add up to.
struct ColumnsMoved {
  float parts[2] = {0.0f, 0.0f};  // the mass moved, columns out of range
};

// Updates column j, in which the plan's mass is `mass`. The new v waits for its judgement.
CLAFUSION_TEAM void update_column(const Columns& columns, std::int64_t j, float mass,
                                  const RowUpdate& update, ColumnsMoved& moved) {
  const ColumnUpdate one = scale_column(mass, columns.weights[j], columns.v[j], columns.target[j],
                                        update.exponent, update.omega);
  columns.next[j] = one.next;
  moved.parts[0] += one.moved;
  moved.parts[1] += one.in_range ? 0.0f : 1.0f;
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
CLAFUSION_TEAM void settle_columns(Team& team, float ratio, bool balanced, const Columns& columns) {
  float found[2] = {0.0f, 0.0f};
  for (int j = team.rank(); j < columns.count; j += team.size()) {
    if (!(columns.v[j] > 0.0f)) continue;
    columns.target[j] = (columns.target[j] + log2_of(columns.v[j])) * ratio;
    columns.v[j] = 1.0f;
    found[0] += columns.target[j];
    found[1] += 1.0f;
  }
  team.sum(found);
  if (!balanced) return;
  const float mean = found[0] / found[1];
  for (int j = team.rank(); j < columns.count; j += team.size()) {
    if (columns.v[j] > 0.0f) columns.target[j] -= mean;
  }
}

// The target side at the start.
template <class Team>
CLAFUSION_TEAM void start_columns(Team& team, const SinkhornTask& task,
                                  const SinkhornControl& control, bool balanced,
                                  const Columns& columns) {
  const double share = balanced ? control.mass : 1.0;
  const double unit = potential_unit(control);
  for (int j = team.rank(); j < columns.count; j += team.size()) {
    columns.weights[j] = static_cast<float>(task.target_weights[j] / share);
    const bool live = columns.weights[j] > 0.0f;
    columns.v[j] = live ? 1.0f : 0.0f;
    const bool warm = live && task.initial_potential != nullptr;
    columns.target[j] = warm ? static_cast<float>(task.initial_potential[j] / unit) : 0.0f;
  }
  settle_columns(team, 1.0f, balanced, columns);
}

// One column's part of the update in the log domain, over some rows: the largest exponent, or,
// given that, the sum.
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

// The update in the log domain, given the column's largest exponent, in `next`, and its sum.
CLAFUSION_TEAM void update_column_afresh(const Columns& columns, std::int64_t j, float sum,
                                         float exponent) {
  if (!(columns.v[j] > 0.0f)) return;
  columns.target[j] = exponent * (log2_of(columns.weights[j]) - columns.next[j] - log2_of(sum));
  columns.v[j] = 1.0f;
}

// After the update of all columns in the log domain.
template <class Team>
CLAFUSION_TEAM void finish_columns_afresh(Team& team, SinkhornControl& control, bool balanced,
                                          const Columns& columns) {
  settle_columns(team, 1.0f, balanced, columns);
  control.pass = SinkhornPass::rows_afresh;
}

// Judges an iteration by what all its columns' updates add up to, and takes these over where it
// goes on. What else is to be done is the caller's.
template <class Team>
CLAFUSION_TEAM SinkhornStep judge_columns(Team& team, SinkhornControl& control,
                                          const SinkhornSettings& settings,
                                          const ColumnsMoved& moved, const Columns& columns) {
  const SinkhornStep step =
      judge(control, settings, static_cast<double>(moved.parts[0]), !(moved.parts[1] > 0.0f));
  if (step == SinkhornStep::go_on) {
    for (int j = team.rank(); j < columns.count; j += team.size()) {
      take_over(columns.next[j], columns.v[j], columns.target[j]);
    }
  } else if (step == SinkhornStep::next_stage) {
    const float ratio = enter_stage(control, settings, control.epsilon / kStageFactor);
    settle_columns(team, ratio, settings.balanced(), columns);
  }
  return step;
}

}  // namespace clafusion::block
