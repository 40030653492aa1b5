#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/interruptible.hpp"
#include "bindings/register.hpp"
#include "bindings/sinkhorn_settings.hpp"
#include "sinkhorn/cpu/sinkhorn.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

struct Sides {
  std::int64_t sources, targets;  // of all problems together
};

Sides check_matrices(const std::vector<Floats>& costs, const std::vector<Floats>& plans) {
  Sides sides{0, 0};
  for (std::size_t i = 0; i < costs.size(); ++i) {
    if (costs[i].ndim() != 2) throw py::value_error("costs must have two dimensions");
    if (plans[i].ndim() != 2 || plans[i].shape(0) != costs[i].shape(0) ||
        plans[i].shape(1) != costs[i].shape(1)) {
      throw py::value_error("plans must have the shapes of costs");
    }
    sides.sources += costs[i].shape(0);
    sides.targets += costs[i].shape(1);
  }
  return sides;
}

std::optional<Doubles> check_initial_potential(const py::object& given, std::int64_t targets) {
  if (given.is_none()) return std::nullopt;
  if (!py::isinstance<Doubles>(given)) {
    throw py::type_error("initial_potential must be None or a contiguous float64 array");
  }
  auto initial = py::reinterpret_borrow<Doubles>(given);
  require_aligned(initial, "initial_potential");
  if (initial.size() != targets) {
    throw py::value_error("initial_potential must have one entry a column");
  }
  return initial;
}

// Weights and potentials of ragged problems lie one behind the other in flat arrays.
void sinkhorn_ragged(const std::vector<Floats>& costs, const Doubles& source_weights,
                     const Doubles& target_weights, const py::object& initial_potential,
                     double epsilon, double tolerance, std::int64_t max_iterations,
                     double marginal_relaxation, std::vector<Floats> plans,
                     Doubles source_potentials, Doubles target_potentials, Doubles totals,
                     Doubles errors, Integers iterations, Integers converged) {
  require_aligned(source_weights, "source_weights");
  require_aligned(target_weights, "target_weights");
  require_aligned(source_potentials, "source_potentials");
  require_aligned(target_potentials, "target_potentials");
  require_aligned(totals, "totals");
  require_aligned(errors, "errors");
  require_aligned(iterations, "iterations");
  require_aligned(converged, "converged");
  for (const Floats& cost : costs) require_aligned(cost, "costs");
  for (const Floats& plan : plans) require_aligned(plan, "plans");
  const auto count = static_cast<std::int64_t>(costs.size());
  if (plans.size() != costs.size()) throw py::value_error("plans must have one entry a problem");
  for (const auto size : {totals.size(), errors.size(), iterations.size(), converged.size()}) {
    if (size != count) {
      throw py::value_error("totals, errors, iterations, converged must have one entry a problem");
    }
  }
  const Sides sides = check_matrices(costs, plans);
  if (source_weights.size() != sides.sources || source_potentials.size() != sides.sources) {
    throw py::value_error("source_weights and source_potentials must have one entry a row");
  }
  if (target_weights.size() != sides.targets || target_potentials.size() != sides.targets) {
    throw py::value_error("target_weights and target_potentials must have one entry a column");
  }
  const auto initial = check_initial_potential(initial_potential, sides.targets);
  const auto settings = sinkhorn_settings(epsilon, tolerance, max_iterations, marginal_relaxation);

  std::vector<SinkhornProblem> problems(costs.size());
  std::vector<SinkhornSolution> solutions(costs.size());
  const double* a = source_weights.data();
  const double* b = target_weights.data();
  const double* start = initial ? initial->data() : nullptr;
  double* f = source_potentials.mutable_data();
  double* g = target_potentials.mutable_data();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t n = costs[i].shape(0);
    const std::int64_t m = costs[i].shape(1);
    problems[i] = {costs[i].data(), n, m, a, b, start};
    solutions[i].plan = plans[i].mutable_data();
    solutions[i].source_potential = f;
    solutions[i].target_potential = g;
    a += n;
    f += n;
    b += m;
    g += m;
    if (start != nullptr) start += m;
  }
  std::atomic<bool> stop = false;
  // Safe without the GIL: the arrays above are kept alive by this call's arguments.
  run_interruptible(stop,
                    [&] { sinkhorn(problems.data(), solutions.data(), count, settings, stop); });
  for (std::int64_t i = 0; i < count; ++i) {
    totals.mutable_data()[i] = solutions[i].cost;
    errors.mutable_data()[i] = solutions[i].marginal_error;
    iterations.mutable_data()[i] = solutions[i].iterations;
    converged.mutable_data()[i] = solutions[i].converged ? 1 : 0;
  }
}

}  // namespace

void register_sinkhorn(py::module_& module) {
  module.def("sinkhorn", &sinkhorn_ragged, py::arg("costs").noconvert(),
             py::arg("source_weights").noconvert(), py::arg("target_weights").noconvert(),
             py::arg("initial_potential"), py::arg("epsilon"), py::arg("tolerance"),
             py::arg("max_iterations"), py::arg("marginal_relaxation"),
             py::arg("plans").noconvert(), py::arg("source_potentials").noconvert(),
             py::arg("target_potentials").noconvert(), py::arg("totals").noconvert(),
             py::arg("errors").noconvert(), py::arg("iterations").noconvert(),
             py::arg("converged").noconvert());
}

}  // namespace clafusion
