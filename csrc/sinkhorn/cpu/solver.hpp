// The CPU's solver of one entropic transport problem.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "sinkhorn/cpu/loops.hpp"
#include "sinkhorn/cpu/sinkhorn.hpp"
#include "sinkhorn/problem.hpp"
#include "sinkhorn/settings.hpp"

namespace clafusion {

// One problem at a time; the memory is kept for the next one.
class SinkhornSolver {
 public:
  SinkhornSolver(const SinkhornSettings& settings, const std::atomic<bool>& stop)
      : settings_(settings), stop_(stop) {}

  // Settings and problem must be valid, but for the costs: throws std::invalid_argument where these
  // are not finite.
  void solve(const SinkhornProblem& problem, SinkhornSolution& solution);

 private:
  // Finds potentials for the settings' epsilon by way of larger ones. The last iteration is kept
  // for that epsilon: a plan for another one is no answer, nor is its error.
  void anneal(SinkhornSolution& solution);

  bool stopped(const SinkhornSolution& solution, std::int64_t most) const;
  void prepare(const SinkhornProblem& problem);

  // Moves to another epsilon. Potentials are held in units of it.
  void set_epsilon(double epsilon);

  void start_from(const double* potential);

  // Calls body(block, first row, last row).
  template <class Body>
  void for_blocks(std::int64_t rows, const Body& body) const;

  void add_up_blocks();

  // Balanced potentials may be shifted against each other: near 0 float resolves them best.
  void centre();

  // Builds the kernel around the target potentials and makes a row update, both in the log
  // domain: stable from any potentials. False if rows or columns are out of the kernel's range.
  bool rebuild();

  // The marginal error where rebuild() has failed: too little reaches some column for its scaling
  // to be a number. Not known for soft marginals, where rows too may be out of range.
  double error_after_rebuild() const;

  double scale_all_rows(loops::Update update);

  // The column update in the log domain, after a log domain row update.
  void update_columns_in_log_domain();

  void absorb();

  // Iterates at one epsilon until the marginal error is at most `tolerance`, or until the solution
  // has had `most` iterations. Leaves the last scalings in place for write() and absorbs the
  // columns' for the next epsilon.
  void iterate(double tolerance, std::int64_t most, SinkhornSolution& solution);

  void write(SinkhornSolution& solution);

  const SinkhornSettings& settings_;
  const std::atomic<bool>& stop_;
  SinkhornProblem problem_{};
  std::int64_t n_ = 0, m_ = 0, rows_ = 0, stride_ = 0, blocks_ = 0;
  double epsilon_ = 0.0, magnitude_ = 0.0, mass_ = 1.0;
  float scale_ = 0.0f, exponent_ = 1.0f;
  // The plan is diag(u) kernel diag(v), kernel = exp(source_i + target_j - scale cost_ij).
  std::vector<float> kernel_, u_, v_, before_, source_, target_, source_offsets_, target_offsets_;
  std::vector<float> source_weights_, target_weights_, sums_;
  std::vector<double> moved_;
};

}  // namespace clafusion
