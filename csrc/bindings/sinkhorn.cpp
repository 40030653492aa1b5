#include "sinkhorn.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#include "bindings/aligned.hpp"
#include "bindings/register.hpp"

namespace py = pybind11;

namespace clafusion {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Integers = py::array_t<std::int64_t, py::array::c_style>;

// Runs `work` on a thread of its own while this one looks for signals ten times a second: only
// Python's main thread may do that, and it cannot while it computes.
template <class Work>
void run_interruptible(std::atomic<bool>& stop, const Work& work) {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr failure;
  bool interrupted = false;
  {
    const py::gil_scoped_release release;
    std::thread worker([&] {
      try {
        work();
      } catch (...) {
        failure = std::current_exception();
      }
      const std::lock_guard<std::mutex> lock(mutex);
      done = true;
      changed.notify_one();
    });
    std::unique_lock<std::mutex> lock(mutex);
    while (!changed.wait_for(lock, std::chrono::milliseconds(100), [&] { return done; })) {
      if (interrupted) continue;
      lock.unlock();
      {
        const py::gil_scoped_acquire acquire;
        interrupted = PyErr_CheckSignals() != 0;
        // The exception stays set on this thread until the worker has stopped.
      }
      if (interrupted) stop.store(true, std::memory_order_relaxed);
      lock.lock();
    }
    lock.unlock();
    worker.join();
  }
  if (interrupted) throw py::error_already_set();
  if (failure) std::rethrow_exception(failure);
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
  std::int64_t sources = 0;
  std::int64_t targets = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (costs[i].ndim() != 2) throw py::value_error("costs must have two dimensions");
    if (plans[i].ndim() != 2 || plans[i].shape(0) != costs[i].shape(0) ||
        plans[i].shape(1) != costs[i].shape(1)) {
      throw py::value_error("plans must have the shapes of costs");
    }
    sources += costs[i].shape(0);
    targets += costs[i].shape(1);
  }
  if (source_weights.size() != sources || source_potentials.size() != sources) {
    throw py::value_error("source_weights and source_potentials must have one entry a row");
  }
  if (target_weights.size() != targets || target_potentials.size() != targets) {
    throw py::value_error("target_weights and target_potentials must have one entry a column");
  }
  Doubles initial;
  const double* start = nullptr;
  if (!initial_potential.is_none()) {
    if (!py::isinstance<Doubles>(initial_potential)) {
      throw py::type_error("initial_potential must be None or a contiguous float64 array");
    }
    initial = py::reinterpret_borrow<Doubles>(initial_potential);
    require_aligned(initial, "initial_potential");
    if (initial.size() != targets) {
      throw py::value_error("initial_potential must have one entry a column");
    }
    start = initial.data();
  }
  std::vector<SinkhornProblem> problems(costs.size());
  std::vector<SinkhornSolution> solutions(costs.size());
  double* f = source_potentials.mutable_data();
  double* g = target_potentials.mutable_data();
  sources = targets = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t n = costs[i].shape(0);
    const std::int64_t m = costs[i].shape(1);
    problems[i] = {costs[i].data(),
                   n,
                   m,
                   source_weights.data() + sources,
                   target_weights.data() + targets,
                   start == nullptr ? nullptr : start + targets};
    solutions[i].plan = plans[i].mutable_data();
    solutions[i].source_potential = f + sources;
    solutions[i].target_potential = g + targets;
    sources += n;
    targets += m;
  }
  std::atomic<bool> stop = false;
  const SinkhornSettings settings{epsilon, tolerance, max_iterations, marginal_relaxation, &stop};
  // Safe without the GIL: the arrays above are kept alive by this call's arguments.
  run_interruptible(stop, [&] { sinkhorn(problems.data(), solutions.data(), count, settings); });
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
