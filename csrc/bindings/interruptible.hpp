// Whether Python's user has asked to stop, from code that runs without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace clafusion {

// Takes the GIL for a moment. True: an exception is set, to be thrown on once the GIL is held
// again.
inline bool signal_pending() {
  const pybind11::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Runs `work` on a thread of its own while this one looks for signals ten times a second: only
// Python's main thread may do that, and it cannot while it computes. `stop` becomes true where one
// has come; its exception stays set on this thread until `work` has returned.
template <class Work>
void run_interruptible(std::atomic<bool>& stop, const Work& work) {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr failure;
  bool interrupted = false;
  {
    const pybind11::gil_scoped_release release;
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
      interrupted = signal_pending();
      if (interrupted) stop.store(true, std::memory_order_relaxed);
      lock.lock();
    }
    lock.unlock();
    worker.join();
  }
  if (interrupted) throw pybind11::error_already_set();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace clafusion
