// What is written when a problem is done.
#pragma once

#include <cmath>
#include <cstdint>

#include "sinkhorn/cuda/block.hpp"

namespace clafusion::block {

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
  const SinkhornStatus status = !control.finite     ? SinkhornStatus::not_finite
                                : control.converged ? SinkhornStatus::converged
                                                    : SinkhornStatus::not_converged;
  *task.total = total;
  *task.error = control.error;
  *task.iterations = control.iterations;
  *task.status = static_cast<std::int64_t>(status);
}

}  // namespace clafusion::block
