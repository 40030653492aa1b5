// Sinkhorn's iteration for problems of any size: many teams a problem, each with a stripe of rows,
// and all that lasts in device memory. An iteration is three steps with nothing but the end of
// a step to wait for: stripes (rows), tiles (columns), and the judgement.
#pragma once

#include "sinkhorn/cuda/block.hpp"
#include "sinkhorn/cuda/columns.hpp"
#include "sinkhorn/cuda/rows.hpp"
#include "sinkhorn/cuda/solution.hpp"

namespace clafusion::block {

// How a problem is cut: by its shape alone, so that the result does not depend on the machine.
inline constexpr std::int64_t kMostStripes = 256;
inline constexpr std::int64_t kLeastStripeRows = 16;
inline constexpr int kTileColumns = 32;

CLAFUSION_HOST_DEVICE constexpr std::int64_t stripe_rows(std::int64_t rows) {
  const std::int64_t share = (rows + kMostStripes - 1) / kMostStripes;
  return share < kLeastStripeRows ? kLeastStripeRows : (share + 3) / 4 * 4;
}
CLAFUSION_HOST_DEVICE constexpr std::int64_t num_stripes(std::int64_t rows) {
  return (rows + stripe_rows(rows) - 1) / stripe_rows(rows);
}
CLAFUSION_HOST_DEVICE constexpr std::int64_t num_tiles(std::int64_t columns) {
  return columns / kTileColumns + 1;  // one more "column" holds the mass that the rows moved
}

// A problem's workspace.
struct StreamMemory {
  SinkhornControl* control;
  double* costs;    // (stripes)
  Rows rows;        // (rows)
  Columns columns;  // (columns)
  float* partial;   // (stripes, columns + 1)
  float* found;     // (tiles, 2): each tile's ColumnsMoved
};

constexpr std::int64_t kControlBytes = (sizeof(SinkhornControl) + 15) / 16 * 16;

CLAFUSION_HOST_DEVICE constexpr std::int64_t stream_bytes(std::int64_t rows, std::int64_t columns) {
  const std::int64_t stripes = num_stripes(rows);
  const std::int64_t floats =
      3 * rows + 4 * columns + stripes * (columns + 1) + 2 * num_tiles(columns);
  return (kControlBytes + 8 * stripes + 4 * floats + 255) / 256 * 256;
}

CLAFUSION_TEAM StreamMemory lay_out_stream(void* memory, std::int64_t rows, std::int64_t columns) {
  const std::int64_t stripes = num_stripes(rows);
  StreamMemory result;
  char* const bytes = static_cast<char*>(memory);
  result.control = reinterpret_cast<SinkhornControl*>(bytes);
  result.costs = reinterpret_cast<double*>(bytes + kControlBytes);
  float* next = reinterpret_cast<float*>(result.costs + stripes);
  const auto take = [&next](std::int64_t count) {
    float* const taken = next;
    next += count;
    return taken;
  };
  result.rows.weights = take(rows);
  result.rows.source = take(rows);
  result.rows.u = take(rows);
  result.columns.weights = take(columns);
  result.columns.target = take(columns);
  result.columns.v = take(columns);
  result.columns.next = take(columns);
  result.columns.count = static_cast<int>(columns);
  result.partial = take(stripes * (columns + 1));
  result.found = take(2 * num_tiles(columns));
  return result;
}

struct Stripe {
  std::int64_t first;
  int rows;
};

CLAFUSION_TEAM Stripe stripe_of(std::int64_t rows, std::int64_t stripe) {
  const std::int64_t first = stripe * stripe_rows(rows);
  const std::int64_t left = rows - first;
  return {first, static_cast<int>(left < stripe_rows(rows) ? left : stripe_rows(rows))};
}

// Before all else: the stripe's largest |cost|.
template <class Team>
CLAFUSION_TEAM void stream_look(Team& team, const SinkhornTask& task, const StreamMemory& memory,
                                std::int64_t stripe) {
  const Stripe own = stripe_of(task.num_source, stripe);
  const float* cost = task.cost + own.first * task.num_target;
  float largest[1] = {0.0f};
  for (std::int64_t i = team.rank(); i < own.rows * task.num_target; i += team.size()) {
    const float size = magnitude(cost[i]);
    largest[0] = size > largest[0] ? size : largest[0];
  }
  team.max(largest);
  if (team.rank() == 0) memory.partial[stripe * (task.num_target + 1)] = largest[0];
}

// One team a problem. Returns whether there is nothing to iterate.
template <class Team>
CLAFUSION_TEAM bool stream_start(Team& team, const SinkhornTask& task,
                                 const SinkhornSettings& settings, const StreamMemory& memory) {
  float largest[1] = {0.0f};
  for (std::int64_t s = team.rank(); s < num_stripes(task.num_source); s += team.size()) {
    const float one = memory.partial[s * (task.num_target + 1)];
    largest[0] = one > largest[0] ? one : largest[0];
  }
  team.max(largest);
  const double mass = total_mass(team, task.source_weights, task.num_source);
  SinkhornControl control;
  start(control, settings, largest[0], mass, task.initial_potential != nullptr);
  start_rows(team, task.source_weights, settings.balanced() ? mass : 1.0, task.num_source,
             memory.rows);
  start_columns(team, task, control, settings.balanced(), memory.columns);
  if (team.rank() == 0) *memory.control = control;
  return control.pass == SinkhornPass::done;
}

// The first step: a stripe's rows. The team's lanes share each row.
template <int kRows, int kColumns, bool kWide, class Team>
CLAFUSION_TEAM void stream_stripe(Team& team, const SinkhornTask& task, const StreamMemory& memory,
                                  std::int64_t stripe) {
  const SinkhornControl& control = *memory.control;
  const SinkhornPass pass = control.pass;
  if (pass == SinkhornPass::done) return;
  const int m = static_cast<int>(task.num_target);
  const Stripe own = stripe_of(task.num_source, stripe);
  const float* cost = task.cost + own.first * m;
  float* const source = memory.rows.source + own.first;
  float* const u = memory.rows.u + own.first;
  float* const partial = memory.partial + stripe * (m + std::int64_t{1});
  if (pass == SinkhornPass::column_tops || pass == SinkhornPass::column_sums) {
    for (int j = team.rank(); j < m; j += team.size()) {
      partial[j] =
          pass == SinkhornPass::column_tops
              ? column_top(cost + j, m, own.rows, control.scale, source, u)
              : column_sum(cost + j, m, own.rows, control.scale, source, u, memory.columns.next[j]);
    }
    return;
  }
  const RowUpdate update = row_update(control);
  auto& lanes = team.lanes();
  float kept[kColumns] = {};
  float moved = 0.0f;
  if constexpr (kWide) {
    for (int j = lanes.rank(); j < m; j += lanes.size()) partial[j] = 0.0f;
  }
  for (int i = 0; i < own.rows; i += kRows) {
    moved += scale_rows<kRows, kColumns, kWide>(
        lanes, cost + static_cast<std::int64_t>(i) * m, own.rows - i, memory.columns, update,
        memory.rows.weights + own.first + i, source + i, u + i, kept, partial);
  }
  if constexpr (!kWide) {
    CLAFUSION_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int j = c * lanes.size() + lanes.rank();
      if (j < m) partial[j] = kept[c];
    }
  }
  if (lanes.rank() == 0) partial[m] = moved;
}

// The second step: a tile of columns puts the stripes together, in an order of its own, by threads
// side by side: `scratch` has a number for each.
template <class Team>
CLAFUSION_TEAM void stream_tile(Team& team, const SinkhornTask& task, const StreamMemory& memory,
                                std::int64_t tile, float* scratch) {
  const SinkhornControl& control = *memory.control;
  const SinkhornPass pass = control.pass;
  if (pass == SinkhornPass::done) return;
  const int m = static_cast<int>(task.num_target);
  const std::int64_t stripes = num_stripes(task.num_source);
  const int width = team.size() < kTileColumns ? team.size() : kTileColumns;
  const int parts = team.size() / width;
  const int part = team.rank() / width;
  const bool tops = pass == SinkhornPass::column_tops;
  const RowUpdate update = row_update(control);
  ColumnsMoved found;
  for (int begin = 0; begin < kTileColumns; begin += width) {
    const std::int64_t j = tile * kTileColumns + begin + team.rank() % width;
    float gathered = tops ? -infinity() : 0.0f;
    for (std::int64_t s = part; part < parts && j <= m && s < stripes; s += parts) {
      const float one = memory.partial[s * (m + std::int64_t{1}) + j];
      gathered = !tops ? gathered + one : (one > gathered ? one : gathered);
    }
    scratch[team.rank()] = gathered;
    team.barrier();
    if (part == 0 && j <= m) {
      for (int other = 1; other < parts; ++other) {
        const float one = scratch[other * width + team.rank()];
        gathered = !tops ? gathered + one : (one > gathered ? one : gathered);
      }
      if (j == m) {
        found.parts[0] += gathered;  // what the rows moved
      } else if (tops) {
        memory.columns.next[j] = gathered;
      } else if (pass == SinkhornPass::column_sums) {
        update_column_afresh(memory.columns, j, gathered, control.exponent);
      } else {
        update_column(memory.columns, j, gathered, update, found);
      }
    }
    team.barrier();
  }
  team.sum(found.parts);
  if (team.rank() == 0) {
    memory.found[2 * tile] = found.parts[0];
    memory.found[2 * tile + 1] = found.parts[1];
  }
}

// The third step, one team a problem. Returns whether the problem is done now.
template <class Team>
CLAFUSION_TEAM bool stream_judge(Team& team, const SinkhornTask& task,
                                 const SinkhornSettings& settings, const StreamMemory& memory) {
  SinkhornControl control = *memory.control;
  if (control.pass == SinkhornPass::done) return false;
  team.barrier();  // all have read what one will write
  if (control.pass == SinkhornPass::column_tops) {
    control.pass = SinkhornPass::column_sums;
  } else if (control.pass == SinkhornPass::column_sums) {
    finish_columns_afresh(team, control, settings.balanced(), memory.columns);
  } else {
    ColumnsMoved found;
    for (std::int64_t tile = team.rank(); tile < num_tiles(task.num_target); tile += team.size()) {
      found.parts[0] += memory.found[2 * tile];
      found.parts[1] += memory.found[2 * tile + 1];
    }
    team.sum(found.parts);
    judge_columns(team, control, settings, found, memory.columns);
  }
  if (team.rank() == 0) *memory.control = control;
  return control.pass == SinkhornPass::done;
}

// At the end: a stripe's part of the plan.
template <class Team>
CLAFUSION_TEAM void stream_write(Team& team, const SinkhornTask& task,
                                 const SinkhornSettings& settings, const StreamMemory& memory,
                                 std::int64_t stripe) {
  const SinkhornControl& control = *memory.control;
  if (!control.finite) return;
  const int m = static_cast<int>(task.num_target);
  const Stripe own = stripe_of(task.num_source, stripe);
  double total[1] = {0.0};
  for (int i = 0; i < own.rows; ++i) {
    const std::int64_t row = own.first + i;
    total[0] += write_row(team.lanes(), task, control, settings.balanced(), task.cost + row * m,
                          row, memory.columns, memory.rows.source[row], memory.rows.u[row]);
  }
  team.sum(total);
  if (team.rank() == 0) memory.costs[stripe] = total[0];
}

// Last of all, one team a problem.
template <class Team>
CLAFUSION_TEAM void stream_finish(Team& team, const SinkhornTask& task,
                                  const StreamMemory& memory) {
  const SinkhornControl& control = *memory.control;
  if (control.finite) {
    write_columns(team, task, control, memory.columns);
  }
  if (team.rank() != 0) return;
  double total = 0.0;
  for (std::int64_t s = 0; control.finite && s < num_stripes(task.num_source); ++s) {
    total += memory.costs[s];
  }
  write_outcome(task, control, total);
}

}  // namespace clafusion::block
