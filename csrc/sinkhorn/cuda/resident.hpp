// The whole of Sinkhorn's iteration for a problem whose costs stay in the memory of one team, or of
// several that can read each other's: a block's or a cluster's shared memory.
#pragma once

#include "sinkhorn/cuda/block.hpp"
#include "sinkhorn/cuda/columns.hpp"
#include "sinkhorn/cuda/rows.hpp"
#include "sinkhorn/cuda/solution.hpp"

namespace clafusion::block {

// A team's part of a problem: some rows, and all columns.
struct ResidentMemory {
  double* ledger;   // (1): the team's part of the total cost
  float* cost;      // (rows, columns)
  Rows rows;        // (rows)
  Columns columns;  // (columns)
  float* sums;      // (groups, columns + 1): each group's column sums and moved mass
  float* shared;    // (2, columns + 1): the team's, for its peers, in turns
};

CLAFUSION_HOST_DEVICE constexpr std::int64_t rows_of_peer(std::int64_t rows, int peers) {
  return (rows + peers - 1) / peers;
}

CLAFUSION_HOST_DEVICE constexpr std::int64_t resident_bytes(std::int64_t rows, std::int64_t columns,
                                                            int peers, int groups) {
  const std::int64_t own = rows_of_peer(rows, peers);
  const std::int64_t floats =
      own * columns + 3 * own + 4 * columns + (groups + std::int64_t{2}) * (columns + 1);
  return static_cast<std::int64_t>(sizeof(double)) + 4 * floats;
}

CLAFUSION_TEAM ResidentMemory lay_out(void* memory, std::int64_t rows, std::int64_t columns,
                                      int peers, int groups) {
  const std::int64_t own = rows_of_peer(rows, peers);
  ResidentMemory result;
  result.ledger = static_cast<double*>(memory);
  float* next = reinterpret_cast<float*>(result.ledger + 1);
  const auto take = [&next](std::int64_t count) {
    float* const taken = next;
    next += count;
    return taken;
  };
  result.cost = take(own * columns);
  result.rows.weights = take(own);
  result.rows.source = take(own);
  result.rows.u = take(own);
  result.columns.weights = take(columns);
  result.columns.target = take(columns);
  result.columns.v = take(columns);
  result.columns.next = take(columns);
  result.columns.count = static_cast<int>(columns);
  result.sums = take(groups * (columns + 1));
  result.shared = take(2 * (columns + 1));
  return result;
}

// What the teams tell each other: a number a column, put together in the peers' order.
template <class Team>
struct Exchange {
  Team& team;
  float* buffers;
  std::int64_t size;
  int turn = 0;

  CLAFUSION_TEAM float* mine() { return buffers + turn * size; }

  CLAFUSION_TEAM float sum(std::int64_t j) {
    float total = 0.0f;
    for (int peer = 0; peer < team.peers(); ++peer) total += team.at_peer(mine(), peer)[j];
    return total;
  }

  CLAFUSION_TEAM float max(std::int64_t j) {
    float most = -infinity();
    for (int peer = 0; peer < team.peers(); ++peer) {
      const float one = team.at_peer(mine(), peer)[j];
      most = one > most ? one : most;
    }
    return most;
  }

  // Two buffers in turns: a team writes the one that all have left before the last exchange.
  CLAFUSION_TEAM void swap() { turn ^= 1; }
};

// Reads the team's rows of the matrix, for the only time. Returns all peers' largest |cost|.
template <class Team>
CLAFUSION_TEAM float read_costs(Team& team, Exchange<Team>& exchange, const SinkhornTask& task,
                                const ResidentMemory& memory, std::int64_t first, int rows) {
  const int m = memory.columns.count;
  float largest[1] = {0.0f};
  const float* cost = task.cost + first * m;
  for (std::int64_t i = team.rank(); i < std::int64_t{rows} * m; i += team.size()) {
    const float x = cost[i];
    memory.cost[i] = x;
    const float size = magnitude(x);
    largest[0] = size > largest[0] ? size : largest[0];
  }
  team.max(largest);
  if (team.rank() == 0) exchange.mine()[m] = largest[0];
  team.exchange();
  const float most = exchange.max(m);
  exchange.swap();
  return most;
}

// The update of all columns in the log domain; `rows` is how many the team has.
template <class Team>
CLAFUSION_TEAM void update_columns_afresh(Team& team, Exchange<Team>& exchange,
                                          const ResidentMemory& memory, int rows,
                                          SinkhornControl& control, bool balanced) {
  const Columns& columns = memory.columns;
  const int m = columns.count;
  for (int j = team.rank(); j < m; j += team.size()) {
    exchange.mine()[j] =
        column_top(memory.cost + j, m, rows, control.scale, memory.rows.source, memory.rows.u);
  }
  team.exchange();
  for (int j = team.rank(); j < m; j += team.size()) columns.next[j] = exchange.max(j);
  exchange.swap();
  for (int j = team.rank(); j < m; j += team.size()) {
    exchange.mine()[j] = column_sum(memory.cost + j, m, rows, control.scale, memory.rows.source,
                                    memory.rows.u, columns.next[j]);
  }
  team.exchange();
  for (int j = team.rank(); j < m; j += team.size()) {
    update_column_afresh(columns, j, exchange.sum(j), control.exponent);
  }
  exchange.swap();
  finish_columns_afresh(team, control, balanced, columns);
}

// Writes the team's rows of the plan, which start at the problem's row `first`, and the outcome.
template <class Team>
CLAFUSION_TEAM void write_resident(Team& team, const SinkhornTask& task,
                                   const ResidentMemory& memory, std::int64_t first, int rows,
                                   const SinkhornControl& control, bool balanced) {
  const Columns& columns = memory.columns;
  const int m = columns.count;
  auto& lanes = team.lanes();
  double total[1] = {0.0};
  if (control.finite) {
    for (int i = team.group(); i < rows; i += team.groups()) {
      total[0] +=
          write_row(lanes, task, control, balanced, memory.cost + static_cast<std::int64_t>(i) * m,
                    first + i, columns, memory.rows.source[i], memory.rows.u[i]);
    }
    if (team.peer() == 0) write_columns(team, task, control, columns);
  }
  team.sum(total);
  if (team.rank() == 0) *memory.ledger = total[0];
  team.exchange();
  if (team.peer() == 0 && team.rank() == 0) {
    total[0] = 0.0;
    for (int peer = 0; peer < team.peers(); ++peer) {
      total[0] += *team.at_peer(memory.ledger, peer);
    }
    write_outcome(task, control, total[0]);
  }
  team.exchange();  // no peer leaves while its memory is read
}

// Solves the problem; all its peers call this. kColumns lanes' worth of columns hold them all.
template <int kRows, int kColumns, class Team>
CLAFUSION_TEAM void solve_resident(Team& team, const SinkhornTask& task,
                                   const SinkhornSettings& settings, void* memory_) {
  const std::int64_t n = task.num_source;
  const int m = static_cast<int>(task.num_target);
  const ResidentMemory memory = lay_out(memory_, n, m, team.peers(), team.groups());
  const std::int64_t most = rows_of_peer(n, team.peers());
  const std::int64_t first = most * team.peer() < n ? most * team.peer() : n;
  const int rows = static_cast<int>(first + most < n ? most : n - first);
  const bool balanced = settings.balanced();
  Exchange<Team> exchange{team, memory.shared, m + std::int64_t{1}};

  const float largest = read_costs(team, exchange, task, memory, first, rows);
  const double mass = total_mass(team, task.source_weights, n);
  SinkhornControl control;
  start(control, settings, largest, mass, task.initial_potential != nullptr);
  start_rows(team, task.source_weights + first, balanced ? mass : 1.0, rows, memory.rows);
  const Columns& columns = memory.columns;
  start_columns(team, task, control, balanced, columns);
  team.barrier();

  auto& lanes = team.lanes();
  while (control.pass != SinkhornPass::done) {
    const RowUpdate update = row_update(control);
    float kept[kColumns] = {};
    float moved = 0.0f;
    for (int i = team.group() * kRows; i < rows; i += team.groups() * kRows) {
      moved += scale_rows<kRows, kColumns, false>(
          lanes, memory.cost + static_cast<std::int64_t>(i) * m, rows - i, columns, update,
          memory.rows.weights + i, memory.rows.source + i, memory.rows.u + i, kept, nullptr);
    }
    float* const sums = memory.sums + std::int64_t{team.group()} * (m + 1);
    CLAFUSION_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int j = c * lanes.size() + lanes.rank();
      if (j < m) sums[j] = kept[c];
    }
    if (lanes.rank() == 0) sums[m] = moved;
    team.barrier();
    for (int j = team.rank(); j <= m; j += team.size()) {
      float sum = 0.0f;
      for (int g = 0; g < team.groups(); ++g) sum += memory.sums[std::int64_t{g} * (m + 1) + j];
      exchange.mine()[j] = sum;
    }
    team.exchange();
    // From here on all peers compute the same, from the same numbers.
    ColumnsMoved found;
    for (int j = team.rank(); j <= m; j += team.size()) {
      const float sum = exchange.sum(j);
      if (j == m) {
        found.parts[0] += sum;  // what the rows moved
      } else {
        update_column(columns, j, sum, update, found);
      }
    }
    exchange.swap();
    team.sum(found.parts);
    const SinkhornStep step = judge_columns(team, control, settings, found, columns);
    if (step == SinkhornStep::columns_afresh) {
      update_columns_afresh(team, exchange, memory, rows, control, balanced);
    }
    team.barrier();
  }
  write_resident(team, task, memory, first, rows, control, balanced);
}

}  // namespace clafusion::block
