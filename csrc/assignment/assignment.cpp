#include "assignment/assignment.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.hpp"
#include "common/simd.hpp"

namespace clafusion {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Columns are padded to whole blocks by infinite costs. Each pass over a row leaves the least
// entry of every block, so that the place of the row's least one is found by looking at one block.
constexpr std::int64_t kBlock = 32;
constexpr std::int64_t kLanes = 16;

// Passes of row reductions over the free rows. Measured on matrices of 64 to 512 rows: 1 to 5 are
// within a tenth of each other.
constexpr int kReductionPasses = 3;

// Rows of this many blocks and more are searched by their near columns first: see search_near. Of
// fewer a pass over whole rows is faster.
constexpr std::int64_t kSearchedNear = 32;
// How many near columns a row has at the most, and of how many blocks it has the least entries.
// Measured on 3072 rows: half and twice as many are within a fifth of each other.
constexpr std::int64_t kNear = 48, kNearBlocks = 24;
// So many searches may end with the same work over whole rows; then no other begins otherwise.
constexpr int kTries = 4;

CLAFUSION_INLINE double lesser(double a, double b) { return a < b ? a : b; }
CLAFUSION_INLINE double greater(double a, double b) { return a < b ? b : a; }

// Lowers the columns' minima by a row. False if the row holds NaN or too large an entry.
CLAFUSION_MULTIVERSION
bool take_row(const double* cost, std::int64_t size, double row, double* __restrict least,
              double* __restrict least_row) {
  double within = 0.0;
  for (std::int64_t j = 0; j < size; ++j) {
    const double x = cost[j];
    const double magnitude = x < 0.0 ? -x : x;
    within += magnitude <= kLargestAssignmentCost ? 0.0 : 1.0;
    least_row[j] = x < least[j] ? row : least_row[j];
    least[j] = lesser(x, least[j]);
  }
  return within == 0.0;
}

// The least two of cost[j] - potential[j]; block_least gets the least of every block.
CLAFUSION_MULTIVERSION
void two_least(const double* cost, const double* potential, std::int64_t stride,
               double* __restrict block_least, double* first, double* second) {
  double one[kLanes], two[kLanes];
  for (int l = 0; l < kLanes; ++l) one[l] = two[l] = kInfinity;
  for (std::int64_t b = 0; b < stride; b += kBlock) {
    double within[kLanes];
    for (int l = 0; l < kLanes; ++l) within[l] = kInfinity;
    for (std::int64_t j = b; j < b + kBlock; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const double x = cost[j + l] - potential[j + l];
        two[l] = lesser(two[l], greater(one[l], x));
        one[l] = lesser(one[l], x);
        within[l] = lesser(within[l], x);
      }
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) within[l] = lesser(within[l], within[l + half]);
    }
    block_least[b / kBlock] = within[0];
  }
  *first = *second = kInfinity;
  for (int l = 0; l < kLanes; ++l) {
    *second = lesser(*second, greater(*first, one[l]));
    *first = lesser(*first, one[l]);
    *second = lesser(*second, two[l]);
  }
}

// distance[j] = min(distance[j], cost[j] - potential[j] - offset), and each block's least.
CLAFUSION_MULTIVERSION
void relax(const double* cost, const double* potential, double offset, std::int64_t stride,
           double* __restrict distance, double* __restrict block_least) {
  for (std::int64_t b = 0; b < stride; b += kBlock) {
    double within[kLanes];
    for (int l = 0; l < kLanes; ++l) within[l] = kInfinity;
    for (std::int64_t j = b; j < b + kBlock; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const double x = lesser(distance[j + l], (cost[j + l] - potential[j + l]) - offset);
        distance[j + l] = x;
        within[l] = lesser(within[l], x);
      }
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) within[l] = lesser(within[l], within[l + half]);
    }
    block_least[b / kBlock] = within[0];
  }
}

// One problem at a time; the memory is kept for the next one.
class Solver {
 public:
  void solve(const AssignmentProblem& problem, AssignmentSolution& solution) {
    prepare(problem);
    reduce_columns();
    for (int pass = 0; pass < kReductionPasses && !free_.empty(); ++pass) reduce_rows();
    for (const std::int64_t row : free_) augment(row);
    solution.cost = 0.0;
    for (std::int64_t i = 0; i < n_; ++i) {
      const std::int64_t j = column_of_[i];
      const double pair = row(i)[j];
      solution.target[i] = j;
      solution.source_potential[i] = pair - price_[j];
      solution.target_potential[i] = price_[i];
      solution.cost += pair;
    }
  }

 private:
  const double* row(std::int64_t i) const { return cost_ + i * stride_; }

  void prepare(const AssignmentProblem& problem) {
    n_ = problem.size;
    stride_ = (n_ + kBlock - 1) / kBlock * kBlock;
    const auto width = static_cast<std::size_t>(stride_);
    price_.assign(width, kInfinity);
    open_price_.resize(width);
    distance_.resize(width);
    cheapest_row_.assign(width, 0.0);
    block_least_.resize(width / kBlock);
    tries_ = stride_ / kBlock >= kSearchedNear ? kTries : 0;
    near_.clear();
    rises_ = 0;
    column_of_.assign(static_cast<std::size_t>(n_), -1);
    row_of_.assign(width, -1);
    for (std::int64_t i = 0; i < n_; ++i) {
      if (!take_row(problem.cost + i * n_, n_, static_cast<double>(i), price_.data(),
                    cheapest_row_.data())) {
        throw std::invalid_argument("costs must be finite and at most 1e200 in magnitude");
      }
    }
    pad(problem.cost);
    std::fill(price_.begin() + n_, price_.end(), 0.0);
  }

  // Whole blocks are read where they lie: a copy of the costs of 4096 rows takes 134 MB.
  void pad(const double* cost) {
    if (stride_ == n_) {
      cost_ = cost;
      return;
    }
    padded_.resize(static_cast<std::size_t>(n_ * stride_));
    for (std::int64_t i = 0; i < n_; ++i) {
      double* to = padded_.data() + i * stride_;
      std::fill(std::copy(cost + i * n_, cost + (i + 1) * n_, to), to + stride_, kInfinity);
    }
    cost_ = padded_.data();
  }

  // Each column goes to its cheapest row, if no column before it did.
  void reduce_columns() {
    for (std::int64_t j = 0; j < n_; ++j) {
      const auto i = static_cast<std::int64_t>(cheapest_row_[j]);
      if (column_of_[i] < 0) match(i, j);
    }
    free_.clear();
    for (std::int64_t i = 0; i < n_; ++i) {
      if (column_of_[i] < 0) free_.push_back(i);
    }
  }

  void match(std::int64_t i, std::int64_t j) {
    column_of_[i] = j;
    row_of_[j] = i;
  }

  std::int64_t place_of_least(const double* cost, double least, std::int64_t skipped) const {
    for (std::int64_t b = 0; b < stride_; b += kBlock) {
      if (block_least_[b / kBlock] > least) continue;
      for (std::int64_t j = b; j < b + kBlock; ++j) {
        if (j != skipped && cost[j] - price_[j] == least) return j;
      }
    }
    return -1;
  }

  // Augmenting row reduction: a free row takes its best column and lowers the column's price until
  // the second best is as good; who held the column becomes free. The original lets that one choose
  // at once, and so on while prices move: such a price war may go on in steps as small as rounding,
  // and was two to four times slower than leaving it to the next pass.
  void reduce_rows() {
    still_free_.clear();
    for (const std::int64_t i : free_) {
      double first, second;
      two_least(row(i), price_.data(), stride_, block_least_.data(), &first, &second);
      std::int64_t j = place_of_least(row(i), first, -1);
      if (first < second) {
        // A single column has no second best.
        if (second < kInfinity) price_[j] -= second - first;
      } else if (row_of_[j] >= 0) {
        j = place_of_least(row(i), second, j);
      }
      const std::int64_t displaced = row_of_[j];
      match(i, j);
      if (displaced >= 0) {
        column_of_[displaced] = -1;
        still_free_.push_back(displaced);
      }
    }
    free_.swap(still_free_);
  }

  struct Scanned {
    std::int64_t column, row;  // row: who holds the column
    double distance;           // of the column
    double offset;             // of the row's costs: what reaching others through it costs less
  };

  // Dijkstra's algorithm over the columns from a free row to a free column. Of equally near columns
  // a free one comes first, for it ends the search: where most costs are equal, as those of dead
  // channels, every search would else go through all columns.
  void augment(std::int64_t start) {
    if (tries_ > 0) {
      if (search_near(start)) return;
      --tries_;
    }
    search_whole_rows(start);
  }

  void search_whole_rows(std::int64_t start) {
    std::copy(price_.begin(), price_.end(), open_price_.begin());
    std::fill(distance_.begin(), distance_.end(), kInfinity);
    scanned_.clear();
    // The start is scanned as the holder of no column.
    scanned_.push_back({-1, start, 0.0, 0.0});
    std::int64_t j;
    double least;
    for (;;) {
      const Scanned& last = scanned_.back();
      relax(row(last.row), open_price_.data(), last.offset, stride_, distance_.data(),
            block_least_.data());
      const auto block = std::min_element(block_least_.begin(), block_least_.end());
      least = *block;
      j = nearest(least, block - block_least_.begin());
      if (row_of_[j] < 0) break;
      const std::int64_t i = row_of_[j];
      scanned_.push_back({j, i, least, (row(i)[j] - price_[j]) - least});
      distance_[j] = kInfinity;
      open_price_[j] = -kInfinity;  // no path leads back
    }
    // Back along the path: column j was reached from the scanned row that is nearest to it among
    // those scanned before it.
    std::size_t before = scanned_.size();
    for (;;) {
      std::size_t from = 0;
      double nearest = kInfinity;
      for (std::size_t s = 0; s < before; ++s) {
        const double x = (row(scanned_[s].row)[j] - price_[j]) - scanned_[s].offset;
        if (x < nearest) {
          nearest = x;
          from = s;
        }
      }
      match(scanned_[from].row, j);
      if (from == 0) break;
      j = scanned_[from].column;
      before = from;
    }
    lower_prices(least);
  }

  // The first free column at a distance, which no block before the given one has; the first of all
  // where none is free.
  std::int64_t nearest(double least, std::int64_t block) const {
    std::int64_t first = -1;
    for (std::int64_t b = block * kBlock; b < n_; b += kBlock) {
      if (block_least_[b / kBlock] != least) continue;
      for (std::int64_t j = b; j < std::min(b + kBlock, n_); ++j) {
        if (distance_[j] != least) continue;
        if (row_of_[j] < 0) return j;
        if (first < 0) first = j;
      }
    }
    return first;
  }

  void lower_prices(double least) {
    for (std::size_t s = 1; s < scanned_.size(); ++s) {
      double& price = price_[scanned_[s].column];
      const double before = price;
      price += scanned_[s].distance - least;
      // Rounding may scan a column that is farther than the last one by a hair.
      if (price > before) ++rises_;
    }
  }

  // The same search, by the columns that are near to each row: it finds the same path, also where
  // several are equally short, with far fewer entries read. Of the other columns is known that they
  // are no nearer than a bound, which stays true while prices fall. Where the nearest column found
  // is not nearer than the bounds of all scanned rows, the row of the least bound reaches its
  // columns one and all. False, with nothing changed, where that happens so often that passes over
  // whole rows are faster, as where most costs are equal.
  bool search_near(std::int64_t start) {
    if (near_.empty()) prepare_near();
    std::fill(distance_.begin(), distance_.end(), kInfinity);
    waiting_.clear();
    scanned_.clear();
    bounds_.clear();
    nearest_free_ = kInfinity;
    double bound = kInfinity;
    scan({-1, start, 0.0, 0.0}, bound);
    std::size_t whole_rows = 0;
    Waiting next;
    for (;;) {
      while (!waiting_.empty() && waiting_.front().distance > distance_[waiting_.front().column]) {
        pop();
      }
      if (waiting_.empty() || waiting_.front().distance >= bound) {
        if (++whole_rows > 8 + scanned_.size() / 4) return false;
        bound = reach_all();
        continue;
      }
      next = waiting_.front();
      if (row_of_[next.column] < 0) break;
      pop();
      const std::int64_t j = next.column, i = row_of_[j];
      distance_[j] = -kInfinity;  // no path leads back
      scan({j, i, next.distance, (row(i)[j] - price_[j]) - next.distance}, bound);
    }
    for (std::int64_t j = next.column;;) {
      const std::int64_t from = reached_from_[j];
      match(scanned_[from].row, j);
      if (from == 0) break;
      j = scanned_[from].column;
    }
    lower_prices(next.distance);
    return true;
  }

  struct Near {
    double cost;
    std::int64_t column;
  };

  // The columns that are near to a row.
  struct NearColumns {
    std::int64_t count = 0;
    double others = 0.0;      // cost - price of all others is at least this
    std::int64_t rises = -1;  // what rises_ was then
  };

  struct Waiting {
    double distance;
    bool is_held;
    std::int64_t column;
    // A heap's front is its greatest: here the nearest column, of equally near ones the first that
    // is free, and where none is free the first of all.
    bool operator<(const Waiting& other) const {
      if (distance != other.distance) return distance > other.distance;
      return is_held != other.is_held ? is_held : column > other.column;
    }
  };

  void prepare_near() {
    near_.resize(static_cast<std::size_t>(n_ * kNear));
    near_of_.assign(static_cast<std::size_t>(n_), {});
    reached_from_.resize(static_cast<std::size_t>(n_));
  }

  void pop() {
    std::pop_heap(waiting_.begin(), waiting_.end());
    waiting_.pop_back();
  }

  // Lets a row reach the columns that are near to it; lowers the least of all rows' bounds.
  void scan(const Scanned& last, double& bound) {
    NearColumns& columns = near_of_[last.row];
    if (columns.rises != rises_) find_near(last.row);
    const auto from = static_cast<std::int64_t>(scanned_.size());
    const Near* near = near_.data() + last.row * kNear;
    for (std::int64_t k = 0; k < columns.count; ++k) {
      reach(near[k].column, near[k].cost, last.offset, from);
    }
    scanned_.push_back(last);
    bounds_.push_back(columns.others - last.offset);
    bound = lesser(bound, bounds_.back());
  }

  void reach(std::int64_t j, double cost, double offset, std::int64_t from) {
    const double x = (cost - price_[j]) - offset;
    // No shortest path leads through what is farther than a free column.
    if (x > nearest_free_) return;
    if (x < distance_[j]) {
      distance_[j] = x;
      reached_from_[j] = from;
      waiting_.push_back({x, row_of_[j] >= 0, j});
      std::push_heap(waiting_.begin(), waiting_.end());
      if (row_of_[j] < 0) nearest_free_ = x;
    } else if (x == distance_[j]) {
      reached_from_[j] = std::min(reached_from_[j], from);
    }
  }

  // Lets the row whose bound is the least reach all columns; returns the least bound then.
  double reach_all() {
    const auto least = std::min_element(bounds_.begin(), bounds_.end());
    const std::int64_t from = least - bounds_.begin();
    const Scanned& one = scanned_[from];
    for (std::int64_t j = 0; j < n_; ++j) reach(j, row(one.row)[j], one.offset, from);
    find_near(one.row);
    *least = kInfinity;
    return *std::min_element(bounds_.begin(), bounds_.end());
  }

  // Blocks have the least of a row's entries: so many of the blocks, so many near columns at least.
  void find_near(std::int64_t i) {
    double first, second;
    two_least(row(i), price_.data(), stride_, block_least_.data(), &first, &second);
    of_blocks_ = block_least_;
    const auto bound = of_blocks_.begin() + kNearBlocks;
    std::nth_element(of_blocks_.begin(), bound, of_blocks_.end());
    NearColumns found{0, *bound, rises_};
    Near* near = near_.data() + i * kNear;
    for (std::int64_t b = 0; b < n_; b += kBlock) {
      if (block_least_[b / kBlock] >= *bound) continue;
      for (std::int64_t j = b; j < std::min(b + kBlock, n_); ++j) {
        const double x = row(i)[j] - price_[j];
        if (x >= *bound) continue;
        if (found.count < kNear) {
          near[found.count++] = {row(i)[j], j};
        } else {
          found.others = lesser(found.others, x);
        }
      }
    }
    near_of_[i] = found;
  }

  std::int64_t n_ = 0, stride_ = 0;
  const double* cost_ = nullptr;      // (size, stride)
  std::vector<double> padded_;        // the costs, where rows are no whole blocks
  std::vector<double> price_;         // the target potentials
  std::vector<double> open_price_;    // price_, and -inf where the search has been
  std::vector<double> distance_;      // of the columns where it has not been
  std::vector<double> cheapest_row_;  // doubles: lanes as wide as the costs they go with
  std::vector<double> block_least_;
  std::vector<std::int64_t> column_of_, row_of_;  // -1: free
  std::vector<std::int64_t> free_, still_free_;
  std::vector<Scanned> scanned_;

  // Of searches by near columns.
  int tries_ = 0;
  std::int64_t rises_ = 0;  // how many prices rose, by rounding
  std::vector<Near> near_;  // (size, kNear)
  std::vector<NearColumns> near_of_;
  std::vector<double> bounds_;  // of the scanned rows: no column not reached is nearer
  std::vector<double> of_blocks_;
  std::vector<std::int64_t> reached_from_;  // which scanned row is nearest to a column
  std::vector<Waiting> waiting_;            // a heap; a column may wait twice
  double nearest_free_ = kInfinity;         // of the free columns reached
};

}  // namespace

void assign(const AssignmentProblem* problems, AssignmentSolution* solutions, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (problems[i].size < 1) {
      throw std::invalid_argument("costs must have at least one row in problem " +
                                  std::to_string(i));
    }
  }
  // The largest first, each to the next thread that is free: sizes, and so times, differ widely.
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return problems[a].size > problems[b].size;
  });
  std::atomic<std::int64_t> next = 0;
  parallel_for(std::min<std::int64_t>(count, num_threads()), 1, [&](std::int64_t, std::int64_t) {
    Solver solver;
    for (std::int64_t i = next++; i < count; i = next++) {
      solver.solve(problems[order[i]], solutions[order[i]]);
    }
  });
}

}  // namespace clafusion
