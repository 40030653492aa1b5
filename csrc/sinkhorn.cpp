#include "sinkhorn.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "sinkhorn_control.hpp"

namespace clafusion {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Columns are padded to a multiple of kLanes, rows to one of kGroup: the loops have no remainder.
constexpr std::int64_t kLanes = 32;
constexpr std::int64_t kGroup = 16;
// Rows whose column sums are added up apart. Fixed, so that sums do not depend on the threads.
constexpr std::int64_t kBlockRows = 128;
// Entries below which a loop over the blocks is not worth a second thread.
constexpr std::int64_t kParallelEntries = 1 << 16;

// Scalings beyond e^+-12 are absorbed into the kernel. What has underflowed in the kernel
// (e^-87 of its row's largest entry) is then still e^-63 of anything that counts.
constexpr float kLargestScaling = 1.6e5f;
constexpr float kLeastSum = 1e-30f;

// Epsilon annealing (Schmitzer, SIAM J. Sci. Comput. 2019): from the costs' own size down.
constexpr double kAnnealingFactor = 4.0;
constexpr double kAnnealingTolerance = 0.05;
// At a large epsilon most problems are solved in less time than annealing takes: try that first.
constexpr double kDirectEpsilon = 0.04;
constexpr std::int64_t kDirectIterations = 12;

constexpr std::int64_t padded(std::int64_t size, std::int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// How rows (or columns) are updated from the sums of the scaled kernel.
struct Update {
  float relaxation;  // over-relaxation; 1 for plain Sinkhorn
  float exponent;    // of the unbalanced update; 1 for balanced

  bool plain() const { return relaxation == 1.0f && exponent == 1.0f; }
};

// Loops of constant length, so that they become a few instructions.
CLAFUSION_INLINE float lane_sum(const float* lanes) {
  static_assert(kLanes == 32);
  float sixteen[16], eight[8], four[4];
  for (int l = 0; l < 16; ++l) sixteen[l] = lanes[l] + lanes[l + 16];
  for (int l = 0; l < 8; ++l) eight[l] = sixteen[l] + sixteen[l + 8];
  for (int l = 0; l < 4; ++l) four[l] = eight[l] + eight[l + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// dots[r] = sum_j kernel[r, j] v[j], four rows
CLAFUSION_INLINE void row_dots(const float* kernel, std::int64_t stride, const float* v,
                               float* dots) {
  const float* k0 = kernel;
  const float* k1 = kernel + stride;
  const float* k2 = kernel + 2 * stride;
  const float* k3 = kernel + 3 * stride;
  float s0[kLanes] = {}, s1[kLanes] = {}, s2[kLanes] = {}, s3[kLanes] = {};
  for (std::int64_t j = 0; j < stride; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = v[j + l];
      s0[l] += k0[j + l] * x;
      s1[l] += k1[j + l] * x;
      s2[l] += k2[j + l] * x;
      s3[l] += k3[j + l] * x;
    }
  }
  dots[0] = lane_sum(s0);
  dots[1] = lane_sum(s1);
  dots[2] = lane_sum(s2);
  dots[3] = lane_sum(s3);
}

// The new scaling where `sum` times it should be `weight`; `goal` is the one without relaxation.
CLAFUSION_INLINE float updated(float weight, float sum, float old, float offset, Update update,
                               float* goal) {
  float target = weight / sum;
  if (update.exponent != 1.0f) target = simd::exp(update.exponent * simd::log(target)) * offset;
  target = weight > 0.0f ? target : 0.0f;
  *goal = target;
  if (update.relaxation == 1.0f) return target;
  // By the ratio: its logarithm is small near the solution, so that nothing is lost.
  const float relaxed = old * simd::exp(update.relaxation * simd::log(target / old));
  return weight > 0.0f ? relaxed : 0.0f;
}

// Updates u from v and adds u^T kernel to sums, reading the kernel once. Returns the mass that
// the plain row update would still move.
CLAFUSION_MULTIVERSION
double scale_rows(const float* kernel, std::int64_t rows, std::int64_t stride, const float* v,
                  const float* weights, const float* offsets, Update update, float* u,
                  float* __restrict sums) {
  const bool plain = update.plain();
  float excess[kGroup] = {};
  for (std::int64_t j = 0; j < stride; ++j) sums[j] = 0.0f;
  for (std::int64_t i = 0; i < rows; i += kGroup) {
    const float* group = kernel + i * stride;
    float dots[kGroup];
    row_dots(group, stride, v, dots);
    row_dots(group + 4 * stride, stride, v, dots + 4);
    row_dots(group + 8 * stride, stride, v, dots + 8);
    row_dots(group + 12 * stride, stride, v, dots + 12);
    if (plain) {
      for (int r = 0; r < kGroup; ++r) {
        u[i + r] = weights[i + r] > 0.0f ? weights[i + r] / dots[r] : 0.0f;
      }
    } else {
      for (int r = 0; r < kGroup; ++r) {
        float goal;
        const float scaling =
            updated(weights[i + r], dots[r], u[i + r], offsets[i + r], update, &goal);
        excess[r] += dots[r] * std::abs(scaling - goal);
        u[i + r] = scaling;
      }
    }
    for (int half = 0; half < kGroup; half += 4) {
      const float* k = group + half * stride;
      const float u0 = u[i + half], u1 = u[i + half + 1];
      const float u2 = u[i + half + 2], u3 = u[i + half + 3];
      for (std::int64_t j = 0; j < stride; ++j) {
        sums[j] += u0 * k[j] + u1 * k[stride + j] + u2 * k[2 * stride + j] + u3 * k[3 * stride + j];
      }
    }
  }
  double moved = 0.0;
  for (const float part : excess) moved += static_cast<double>(part);
  return moved;
}

// The column's half of the iteration. Returns the mass that the plain update would move; sets
// `least` and `largest` to the extremes of the scalings of columns with a weight.
CLAFUSION_MULTIVERSION
double scale_columns(const float* sums, std::int64_t stride, const float* weights,
                     const float* offsets, Update update, float* v, float* least, float* largest) {
  float moved[kLanes] = {}, low[kLanes], high[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) low[l] = kInfinity;
  for (std::int64_t j = 0; j < stride; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float weight = weights[j + l];
      const float old = v[j + l];
      float goal;
      const float scaling = updated(weight, sums[j + l], old, offsets[j + l], update, &goal);
      moved[l] += weight > 0.0f ? sums[j + l] * std::abs(old - goal) : 0.0f;
      const float seen = weight > 0.0f ? scaling : 1.0f;
      low[l] = seen < low[l] ? seen : low[l];
      high[l] = seen > high[l] ? seen : high[l];
      v[j + l] = scaling;
    }
  }
  double total = 0.0;
  *least = low[0];
  *largest = high[0];
  for (int l = 0; l < kLanes; ++l) {
    total += static_cast<double>(moved[l]);
    *least = std::min(*least, low[l]);
    *largest = std::max(*largest, high[l]);
  }
  return total;
}

// kernel[j] = exp(potential[j] - scale cost[j] - its maximum); returns that maximum.
CLAFUSION_MULTIVERSION
float kernel_row(const float* cost, std::int64_t size, float scale, const float* potential,
                 float* __restrict kernel) {
  float largest[kLanes];
  for (int l = 0; l < kLanes; ++l) largest[l] = -kInfinity;
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t j = 0; j < whole; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = potential[j + l] - scale * cost[j + l];
      largest[l] = x > largest[l] ? x : largest[l];
    }
  }
  float most = -kInfinity;
  for (int l = 0; l < kLanes; ++l) most = std::max(most, largest[l]);
  for (std::int64_t j = whole; j < size; ++j) {
    most = std::max(most, potential[j] - scale * cost[j]);
  }
  for (std::int64_t j = 0; j < size; ++j) {
    kernel[j] = simd::exp((potential[j] - scale * cost[j]) - most);
  }
  return most;
}

// largest[j] = max over the rows of potential_i - scale cost_ij
CLAFUSION_MULTIVERSION
void raise_column_maxima(const float* cost, std::int64_t size, float scale, float potential,
                         float* __restrict largest) {
  for (std::int64_t j = 0; j < size; ++j) {
    const float x = potential - scale * cost[j];
    largest[j] = x > largest[j] ? x : largest[j];
  }
}

CLAFUSION_MULTIVERSION
void add_column_exponentials(const float* cost, std::int64_t size, float scale, float potential,
                             const float* largest, float* __restrict sums) {
  for (std::int64_t j = 0; j < size; ++j) {
    sums[j] += simd::exp((potential - scale * cost[j]) - largest[j]);
  }
}

// plan[j] = u kernel[j] v[j]; returns sum_j plan[j] cost[j]
CLAFUSION_MULTIVERSION
double plan_row(const float* kernel, std::int64_t size, float u, const float* v, const float* cost,
                float* __restrict plan) {
  double total[8] = {};
  const std::int64_t whole = size / 8 * 8;
  for (std::int64_t j = 0; j < whole; j += 8) {
    for (int l = 0; l < 8; ++l) {
      const float p = u * kernel[j + l] * v[j + l];
      plan[j + l] = p;
      total[l] += static_cast<double>(p) * static_cast<double>(cost[j + l]);
    }
  }
  for (std::int64_t j = whole; j < size; ++j) {
    plan[j] = u * kernel[j] * v[j];
    total[0] += static_cast<double>(plan[j]) * static_cast<double>(cost[j]);
  }
  double sum = 0.0;
  for (const double part : total) sum += part;
  return sum;
}

CLAFUSION_MULTIVERSION
float largest_magnitude(const float* cost, std::int64_t size, bool* finite) {
  float largest[kLanes] = {};
  float zero[kLanes] = {};  // stays 0 exactly while all entries are finite
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t j = 0; j < whole; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = std::abs(cost[j + l]);
      largest[l] = x > largest[l] ? x : largest[l];
      zero[l] += x * 0.0f;
    }
  }
  for (std::int64_t j = whole; j < size; ++j) {
    largest[0] = std::max(largest[0], std::abs(cost[j]));
    zero[0] += cost[j] * 0.0f;
  }
  float sum = 0.0f;
  for (int l = 0; l < kLanes; ++l) {
    sum += zero[l];
    largest[0] = std::max(largest[0], largest[l]);
  }
  *finite = sum == 0.0f;
  return largest[0];
}

// One problem at a time; the memory is kept for the next one.
class Solver {
 public:
  explicit Solver(const SinkhornSettings& settings) : settings_(settings) {}

  void solve(const SinkhornProblem& problem, SinkhornSolution& solution) {
    prepare(problem);
    bool balanced = !std::isfinite(settings_.marginal_relaxation);
    solution.iterations = 0;
    solution.converged = false;
    solution.marginal_error = std::numeric_limits<double>::infinity();
    if (problem.target_potential == nullptr) {
      if (settings_.epsilon >= kDirectEpsilon) {
        set_epsilon(settings_.epsilon);
        iterate(settings_.tolerance, std::min(kDirectIterations, settings_.max_iterations),
                balanced, solution);
      }
      if (!solution.converged) anneal(balanced, solution);
    }
    if (!solution.converged) {
      set_epsilon(settings_.epsilon);
      if (problem.target_potential != nullptr) start_from(problem.target_potential);
      iterate(settings_.tolerance, settings_.max_iterations, balanced, solution);
    }
    write(solution);
  }

 private:
  // Finds potentials for the settings' epsilon by way of larger ones. The last iteration is kept
  // for that epsilon: a plan for another one is no answer, nor is its error.
  void anneal(bool balanced, SinkhornSolution& solution) {
    const std::int64_t most = settings_.max_iterations - 1;
    double epsilon = settings_.epsilon;
    while (epsilon * kAnnealingFactor <= 0.5) epsilon *= kAnnealingFactor;
    for (; epsilon > settings_.epsilon * 1.0001; epsilon /= kAnnealingFactor) {
      if (stopped(solution, most)) break;
      set_epsilon(epsilon);
      iterate(std::max(settings_.tolerance, kAnnealingTolerance), most, balanced, solution);
    }
    solution.converged = false;
  }

  bool stopped(const SinkhornSolution& solution, std::int64_t most) const {
    return solution.iterations >= most ||
           (settings_.stop != nullptr && settings_.stop->load(std::memory_order_relaxed));
  }

  void prepare(const SinkhornProblem& problem) {
    problem_ = problem;
    n_ = problem.num_source;
    m_ = problem.num_target;
    stride_ = padded(m_, kLanes);
    rows_ = padded(n_, kGroup);
    blocks_ = (rows_ + kBlockRows - 1) / kBlockRows;
    bool finite = false;
    const float magnitude = largest_magnitude(problem.cost, n_ * m_, &finite);
    if (!finite) throw std::invalid_argument("costs must be finite");
    // Costs that small count as 0: their inverse would overflow.
    magnitude_ = magnitude < 1e-30f ? 0.0 : static_cast<double>(magnitude);
    if (static_cast<std::int64_t>(kernel_.size()) < rows_ * stride_) {
      kernel_.assign(static_cast<std::size_t>(rows_ * stride_), 0.0f);
    }
    // Balanced problems are solved for a mass of 1, so that any mass is in float's range.
    mass_ = 0.0;
    for (std::int64_t i = 0; i < n_; ++i) mass_ += problem.source_weights[i];
    const double unit = std::isfinite(settings_.marginal_relaxation) ? 1.0 : mass_;
    const auto weights = [unit](std::vector<float>& to, const double* from, std::int64_t size,
                                std::int64_t room) {
      to.assign(static_cast<std::size_t>(room), 0.0f);
      for (std::int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(from[i] / unit);
    };
    weights(source_weights_, problem.source_weights, n_, rows_);
    weights(target_weights_, problem.target_weights, m_, stride_);
    u_.assign(static_cast<std::size_t>(rows_), 0.0f);
    v_.assign(static_cast<std::size_t>(stride_), 0.0f);
    source_.assign(static_cast<std::size_t>(rows_), -kInfinity);
    target_.assign(static_cast<std::size_t>(stride_), -kInfinity);
    source_offsets_.assign(static_cast<std::size_t>(rows_), 1.0f);
    target_offsets_.assign(static_cast<std::size_t>(stride_), 1.0f);
    sums_.assign(static_cast<std::size_t>(blocks_ * stride_), 0.0f);
    moved_.assign(static_cast<std::size_t>(blocks_), 0.0);
    for (std::int64_t i = 0; i < n_; ++i) {
      for (std::int64_t j = m_; j < stride_; ++j) kernel_[i * stride_ + j] = 0.0f;
    }
    std::fill(kernel_.begin() + n_ * stride_, kernel_.begin() + rows_ * stride_, 0.0f);
    for (std::int64_t j = 0; j < m_; ++j) {
      if (target_weights_[j] > 0.0f) target_[j] = 0.0f;
    }
    epsilon_ = 0.0;
  }

  // Moves to another epsilon. Potentials are held in units of it.
  void set_epsilon(double epsilon) {
    if (epsilon_ > 0.0) {
      const float ratio = static_cast<float>(epsilon_ / epsilon);
      for (float& g : target_) g *= ratio;
    }
    epsilon_ = epsilon;
    scale_ = magnitude_ > 0.0 ? static_cast<float>(1.0 / (epsilon * magnitude_)) : 0.0f;
    const double rho = settings_.marginal_relaxation;
    exponent_ = std::isfinite(rho) ? static_cast<float>(rho / (rho + epsilon)) : 1.0f;
  }

  void start_from(const double* potential) {
    const double unit = cost_unit();
    for (std::int64_t j = 0; j < m_; ++j) {
      if (target_weights_[j] > 0.0f) target_[j] = static_cast<float>(potential[j] / unit);
    }
  }

  // What a potential of 1 is worth, in units of the cost.
  double cost_unit() const { return epsilon_ * (magnitude_ > 0.0 ? magnitude_ : 1.0); }

  // Calls body(block, first row, last row).
  template <class Body>
  void for_blocks(std::int64_t rows, const Body& body) const {
    const std::int64_t grain = std::max<std::int64_t>(1, kParallelEntries / (kBlockRows * stride_));
    parallel_for(blocks_, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        body(block, block * kBlockRows, std::min(rows, (block + 1) * kBlockRows));
      }
    });
  }

  void add_up_blocks() {
    for (std::int64_t block = 1; block < blocks_; ++block) {
      const float* part = sums_.data() + block * stride_;
      for (std::int64_t j = 0; j < stride_; ++j) sums_[j] += part[j];
    }
  }

  // Balanced potentials may be shifted against each other: near 0 float resolves them best.
  void centre() {
    double sum = 0.0;
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < m_; ++j) {
      if (!(target_weights_[j] > 0.0f)) continue;
      sum += static_cast<double>(target_[j]);
      ++count;
    }
    const auto mean = static_cast<float>(sum / static_cast<double>(count));
    for (float& g : target_) g -= mean;
  }

  // Builds the kernel around the target potentials and makes a row update, both in the log
  // domain: stable from any potentials. False if rows or columns are out of the kernel's range.
  bool rebuild() {
    if (!std::isfinite(settings_.marginal_relaxation)) centre();
    for_blocks(n_, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        source_[i] = -kernel_row(problem_.cost + i * m_, m_, scale_, target_.data(),
                                 kernel_.data() + i * stride_);
      }
    });
    for (std::int64_t j = 0; j < m_; ++j) {
      v_[j] = target_weights_[j] > 0.0f ? 1.0f : 0.0f;
      target_offsets_[j] = std::exp((exponent_ - 1.0f) * std::max(target_[j], -1e30f));
      if (!(target_weights_[j] > 0.0f)) target_offsets_[j] = 0.0f;
    }
    for (std::int64_t i = 0; i < n_; ++i) {
      source_offsets_[i] = std::exp((exponent_ - 1.0f) * source_[i]);
      u_[i] = 1.0f;
    }
    scale_all_rows({1.0f, exponent_});
    for (std::int64_t i = 0; i < n_; ++i) {
      if (source_weights_[i] > 0.0f && !(u_[i] > kLeastSum && u_[i] < 1.0f / kLeastSum)) {
        return false;
      }
    }
    for (std::int64_t j = 0; j < m_; ++j) {
      if (target_weights_[j] > 0.0f && !(sums_[j] > kLeastSum && sums_[j] < 1.0f / kLeastSum &&
                                         target_offsets_[j] < 1.0f / kLeastSum)) {
        return false;
      }
    }
    return true;
  }

  // The marginal error where rebuild() has failed: too little reaches some column for its scaling
  // to be a number. Not known for soft marginals, where rows too may be out of range.
  double error_after_rebuild(bool balanced) const {
    if (!balanced) return std::numeric_limits<double>::infinity();
    double error = 0.0;
    for (std::int64_t j = 0; j < m_; ++j) {
      const float reached = target_weights_[j] > 0.0f ? sums_[j] : 0.0f;
      error += std::abs(static_cast<double>(reached) - static_cast<double>(target_weights_[j]));
    }
    return error;
  }

  double scale_all_rows(Update update) {
    for_blocks(rows_, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
      moved_[block] = scale_rows(kernel_.data() + begin * stride_, end - begin, stride_, v_.data(),
                                 source_weights_.data() + begin, source_offsets_.data() + begin,
                                 update, u_.data() + begin, sums_.data() + block * stride_);
    });
    add_up_blocks();
    double moved = 0.0;
    for (const double part : moved_) moved += part;
    return moved;
  }

  // The column update in the log domain, after a log domain row update.
  void update_columns_in_log_domain() {
    std::vector<float> row(static_cast<std::size_t>(n_));
    for (std::int64_t i = 0; i < n_; ++i) {
      float sum = 0.0f;
      for (std::int64_t j = 0; j < m_; ++j) sum += kernel_[i * stride_ + j];
      row[i] = exponent_ * (std::log(source_weights_[i]) + source_[i] - std::log(sum));
    }
    std::vector<float> largest(sums_.size(), -kInfinity);
    for_blocks(n_, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        raise_column_maxima(problem_.cost + i * m_, m_, scale_, row[i],
                            largest.data() + block * stride_);
      }
    });
    for (std::int64_t block = 1; block < blocks_; ++block) {
      for (std::int64_t j = 0; j < m_; ++j) {
        largest[j] = std::max(largest[j], largest[block * stride_ + j]);
      }
    }
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for_blocks(n_, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        add_column_exponentials(problem_.cost + i * m_, m_, scale_, row[i], largest.data(),
                                sums_.data() + block * stride_);
      }
    });
    add_up_blocks();
    for (std::int64_t j = 0; j < m_; ++j) {
      if (!(target_weights_[j] > 0.0f)) continue;
      target_[j] = exponent_ * (std::log(target_weights_[j]) - largest[j] - std::log(sums_[j]));
    }
  }

  void absorb() {
    for (std::int64_t j = 0; j < m_; ++j) {
      if (target_weights_[j] > 0.0f) target_[j] += std::log(v_[j]);
    }
  }

  // Iterates at one epsilon until the marginal error is at most `tolerance`, or until the solution
  // has had `most` iterations. Leaves the last scalings in place for write() and absorbs the
  // columns' for the next epsilon.
  void iterate(double tolerance, std::int64_t most, bool balanced, SinkhornSolution& solution) {
    Relaxation relaxation;
    bool fresh = true;  // the row update of this iteration is part of the kernel's rebuilding
    solution.converged = false;
    while (!stopped(solution, most)) {
      ++solution.iterations;
      const auto omega = static_cast<float>(relaxation.omega);
      double moved = 0.0;
      if (fresh) {
        while (!rebuild()) {
          if (stopped(solution, most)) {
            solution.marginal_error = error_after_rebuild(balanced);
            return;
          }
          update_columns_in_log_domain();
          ++solution.iterations;
        }
        fresh = false;
      } else {
        moved = scale_all_rows({omega, exponent_});
      }
      before_ = v_;
      float least, largest;
      moved += scale_columns(sums_.data(), stride_, target_weights_.data(), target_offsets_.data(),
                             {omega, exponent_}, v_.data(), &least, &largest);
      solution.marginal_error = balanced ? moved : moved / mass_;
      solution.converged = solution.marginal_error <= tolerance;
      if (solution.converged || stopped(solution, most)) {
        v_.swap(before_);  // back to the plan whose error this is
        absorb();
        return;
      }
      if (!(least > 1.0f / kLargestScaling && largest < kLargestScaling)) {
        if (least > 0.0f && largest < kInfinity) {
          absorb();
        } else {
          update_columns_in_log_domain();
        }
        fresh = true;
      }
      relaxation.observe(solution.marginal_error);
    }
  }

  void write(SinkhornSolution& solution) {
    const double unit = cost_unit();
    const double mass = std::isfinite(settings_.marginal_relaxation) ? 1.0 : mass_;
    std::vector<double> costs(static_cast<std::size_t>(blocks_), 0.0);
    for_blocks(n_, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const float u = u_[i] * static_cast<float>(mass);
        costs[block] += plan_row(kernel_.data() + i * stride_, m_, u, v_.data(),
                                 problem_.cost + i * m_, solution.plan + i * m_);
        solution.source_potential[i] =
            unit * (static_cast<double>(source_[i]) + std::log(mass * static_cast<double>(u_[i])));
      }
    });
    for (std::int64_t j = 0; j < m_; ++j) {
      solution.target_potential[j] = unit * static_cast<double>(target_[j]);
    }
    solution.cost = 0.0;
    for (const double part : costs) solution.cost += part;
  }

  const SinkhornSettings& settings_;
  SinkhornProblem problem_{};
  std::int64_t n_ = 0, m_ = 0, rows_ = 0, stride_ = 0, blocks_ = 0;
  double epsilon_ = 0.0, magnitude_ = 0.0, mass_ = 1.0;
  float scale_ = 0.0f, exponent_ = 1.0f;
  // The plan is diag(u) kernel diag(v), kernel = exp(source_i + target_j - scale cost_ij).
  std::vector<float> kernel_, u_, v_, before_, source_, target_, source_offsets_, target_offsets_;
  std::vector<float> source_weights_, target_weights_, sums_;
  std::vector<double> moved_;
};

void check_weights(const double* weights, std::int64_t size, const char* name) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < size; ++i) {
    if (!(weights[i] >= 0.0) || !std::isfinite(weights[i])) {
      throw std::invalid_argument(std::string(name) + " must be finite and not negative");
    }
    sum += weights[i];
  }
  if (!(sum > 0.0)) throw std::invalid_argument(std::string(name) + " must have a positive sum");
}

void check_pair(const SinkhornProblem& problem, bool soft) {
  double source = 0.0, target = 0.0;
  for (std::int64_t i = 0; i < problem.num_source; ++i) source += problem.source_weights[i];
  for (std::int64_t j = 0; j < problem.num_target; ++j) target += problem.target_weights[j];
  if (!soft && std::abs(source - target) > 2e-6 * source) {
    throw std::invalid_argument("source_weights and target_weights must have the same sum");
  }
  if (problem.target_potential == nullptr) return;
  for (std::int64_t j = 0; j < problem.num_target; ++j) {
    if (problem.target_weights[j] > 0.0 && !std::isfinite(problem.target_potential[j])) {
      throw std::invalid_argument("the initial potential must be finite");
    }
  }
}

}  // namespace

void sinkhorn(const SinkhornProblem* problems, SinkhornSolution* solutions, std::int64_t count,
              const SinkhornSettings& settings) {
  if (!(settings.epsilon > 0.0) || !std::isfinite(settings.epsilon)) {
    throw std::invalid_argument("epsilon must be a positive number");
  }
  if (!(settings.tolerance > 0.0)) throw std::invalid_argument("tolerance must be positive");
  if (settings.max_iterations < 1) throw std::invalid_argument("max_iterations must be positive");
  if (!(settings.marginal_relaxation > 0.0)) {
    throw std::invalid_argument("marginal_relaxation must be positive");
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (problems[i].num_source < 1 || problems[i].num_target < 1) {
      throw std::invalid_argument("a problem needs at least one source and one target");
    }
    check_weights(problems[i].source_weights, problems[i].num_source, "source_weights");
    check_weights(problems[i].target_weights, problems[i].num_target, "target_weights");
    check_pair(problems[i], std::isfinite(settings.marginal_relaxation));
  }
  const auto solve = [&](std::int64_t begin, std::int64_t end) {
    Solver solver(settings);
    for (std::int64_t i = begin; i < end; ++i) solver.solve(problems[i], solutions[i]);
  };
  // Fewer problems than threads: one after another, each on all threads.
  if (count < num_threads()) {
    solve(0, count);
  } else {
    parallel_for(count, 1, solve);
  }
}

}  // namespace clafusion
