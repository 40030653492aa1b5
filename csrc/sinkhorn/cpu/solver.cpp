#include "sinkhorn/cpu/solver.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "common/parallel.hpp"
#include "sinkhorn/annealing.hpp"
#include "sinkhorn/relaxation.hpp"

namespace clafusion {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows whose column sums are added up apart. Fixed, so that sums do not depend on the threads.
constexpr std::int64_t kBlockRows = 128;
// Entries below which a loop over the blocks is not worth a second thread.
constexpr std::int64_t kParallelEntries = 1 << 16;

// Scalings beyond e^+-12 are absorbed into the kernel. What has underflowed in the kernel
// (e^-87 of its row's largest entry) is then still e^-63 of anything that counts.
constexpr float kLargestScaling = 1.6e5f;
constexpr float kLeastSum = 1e-30f;

// At a large epsilon most problems are solved in less time than annealing takes: try that first.
constexpr double kDirectEpsilon = 0.04;
constexpr std::int64_t kDirectIterations = 12;

constexpr std::int64_t padded(std::int64_t size, std::int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

}  // namespace

void SinkhornSolver::solve(const SinkhornProblem& problem, SinkhornSolution& solution) {
  prepare(problem);
  solution.iterations = 0;
  solution.converged = false;
  solution.marginal_error = std::numeric_limits<double>::infinity();
  if (problem.initial_potential == nullptr) {
    if (settings_.epsilon >= kDirectEpsilon) {
      set_epsilon(settings_.epsilon);
      iterate(settings_.tolerance, std::min(kDirectIterations, settings_.max_iterations), solution);
    }
    if (!solution.converged) anneal(solution);
  }
  if (!solution.converged) {
    set_epsilon(settings_.epsilon);
    if (problem.initial_potential != nullptr) start_from(problem.initial_potential);
    iterate(settings_.tolerance, settings_.max_iterations, solution);
  }
  write(solution);
}

void SinkhornSolver::anneal(SinkhornSolution& solution) {
  const std::int64_t most = settings_.max_iterations - 1;
  for (double epsilon = first_epsilon(settings_); !is_last_epsilon(settings_, epsilon);
       epsilon /= kStageFactor) {
    if (stopped(solution, most)) break;
    set_epsilon(epsilon);
    iterate(stage_tolerance(settings_, false), most, solution);
  }
  solution.converged = false;
}

bool SinkhornSolver::stopped(const SinkhornSolution& solution, std::int64_t most) const {
  return solution.iterations >= most || stop_.load(std::memory_order_relaxed);
}

void SinkhornSolver::prepare(const SinkhornProblem& problem) {
  problem_ = problem;
  n_ = problem.num_source;
  m_ = problem.num_target;
  stride_ = padded(m_, loops::kLanes);
  rows_ = padded(n_, loops::kGroup);
  blocks_ = (rows_ + kBlockRows - 1) / kBlockRows;
  bool finite = false;
  const float magnitude = loops::largest_magnitude(problem.cost, n_ * m_, &finite);
  if (!finite) throw std::invalid_argument("costs must be finite");
  magnitude_ = magnitude_of_costs(magnitude);
  if (static_cast<std::int64_t>(kernel_.size()) < rows_ * stride_) {
    kernel_.assign(static_cast<std::size_t>(rows_ * stride_), 0.0f);
  }
  // Balanced problems are solved for a mass of 1, so that any mass is in float's range.
  mass_ = 0.0;
  for (std::int64_t i = 0; i < n_; ++i) mass_ += problem.source_weights[i];
  const double unit = settings_.balanced() ? mass_ : 1.0;
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

void SinkhornSolver::set_epsilon(double epsilon) {
  if (epsilon_ > 0.0) {
    const float ratio = static_cast<float>(epsilon_ / epsilon);
    for (float& g : target_) g *= ratio;
  }
  epsilon_ = epsilon;
  scale_ = scale_of_costs(epsilon, magnitude_, 1.0);
  exponent_ = update_exponent(settings_, epsilon);
}

void SinkhornSolver::start_from(const double* potential) {
  const double unit = unit_of_potentials(epsilon_, magnitude_);
  for (std::int64_t j = 0; j < m_; ++j) {
    if (target_weights_[j] > 0.0f) target_[j] = static_cast<float>(potential[j] / unit);
  }
}

template <class Body>
void SinkhornSolver::for_blocks(std::int64_t rows, const Body& body) const {
  const std::int64_t grain = std::max<std::int64_t>(1, kParallelEntries / (kBlockRows * stride_));
  parallel_for(blocks_, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      body(block, block * kBlockRows, std::min(rows, (block + 1) * kBlockRows));
    }
  });
}

void SinkhornSolver::add_up_blocks() {
  for (std::int64_t block = 1; block < blocks_; ++block) {
    const float* part = sums_.data() + block * stride_;
    for (std::int64_t j = 0; j < stride_; ++j) sums_[j] += part[j];
  }
}

void SinkhornSolver::centre() {
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

bool SinkhornSolver::rebuild() {
  if (settings_.balanced()) centre();
  for_blocks(n_, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      source_[i] = -loops::kernel_row(problem_.cost + i * m_, m_, scale_, target_.data(),
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

double SinkhornSolver::error_after_rebuild() const {
  if (!settings_.balanced()) return std::numeric_limits<double>::infinity();
  double error = 0.0;
  for (std::int64_t j = 0; j < m_; ++j) {
    const float reached = target_weights_[j] > 0.0f ? sums_[j] : 0.0f;
    error += std::abs(static_cast<double>(reached) - static_cast<double>(target_weights_[j]));
  }
  return error;
}

double SinkhornSolver::scale_all_rows(loops::Update update) {
  for_blocks(rows_, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    moved_[block] =
        loops::scale_rows(kernel_.data() + begin * stride_, end - begin, stride_, v_.data(),
                          source_weights_.data() + begin, source_offsets_.data() + begin, update,
                          u_.data() + begin, sums_.data() + block * stride_);
  });
  add_up_blocks();
  double moved = 0.0;
  for (const double part : moved_) moved += part;
  return moved;
}

void SinkhornSolver::update_columns_in_log_domain() {
  std::vector<float> row(static_cast<std::size_t>(n_));
  for (std::int64_t i = 0; i < n_; ++i) {
    float sum = 0.0f;
    for (std::int64_t j = 0; j < m_; ++j) sum += kernel_[i * stride_ + j];
    row[i] = exponent_ * (std::log(source_weights_[i]) + source_[i] - std::log(sum));
  }
  std::vector<float> largest(sums_.size(), -kInfinity);
  for_blocks(n_, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      loops::raise_column_maxima(problem_.cost + i * m_, m_, scale_, row[i],
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
      loops::add_column_exponentials(problem_.cost + i * m_, m_, scale_, row[i], largest.data(),
                                     sums_.data() + block * stride_);
    }
  });
  add_up_blocks();
  for (std::int64_t j = 0; j < m_; ++j) {
    if (!(target_weights_[j] > 0.0f)) continue;
    target_[j] = exponent_ * (std::log(target_weights_[j]) - largest[j] - std::log(sums_[j]));
  }
}

void SinkhornSolver::absorb() {
  for (std::int64_t j = 0; j < m_; ++j) {
    if (target_weights_[j] > 0.0f) target_[j] += std::log(v_[j]);
  }
}

void SinkhornSolver::iterate(double tolerance, std::int64_t most, SinkhornSolution& solution) {
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
          solution.marginal_error = error_after_rebuild();
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
    moved +=
        loops::scale_columns(sums_.data(), stride_, target_weights_.data(), target_offsets_.data(),
                             {omega, exponent_}, v_.data(), &least, &largest);
    solution.marginal_error = marginal_error(settings_, moved, mass_);
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

void SinkhornSolver::write(SinkhornSolution& solution) {
  const double unit = unit_of_potentials(epsilon_, magnitude_);
  const double mass = settings_.balanced() ? mass_ : 1.0;
  std::vector<double> costs(static_cast<std::size_t>(blocks_), 0.0);
  for_blocks(n_, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float u = u_[i] * static_cast<float>(mass);
      costs[block] += loops::plan_row(kernel_.data() + i * stride_, m_, u, v_.data(),
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

}  // namespace clafusion
