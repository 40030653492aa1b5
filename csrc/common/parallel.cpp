#include "common/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace clafusion {
namespace {

int default_num_threads() {
  if (const char* text = std::getenv("CLAFUSION_NUM_THREADS")) {
    const int count = std::atoi(text);
    if (count > 0) return count;
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::atomic<int> requested_threads{0};

}  // namespace

int num_threads() noexcept {
  static const int fallback = default_num_threads();
  const int requested = requested_threads.load(std::memory_order_relaxed);
  return requested > 0 ? requested : fallback;
}

void set_num_threads(int count) {
  if (count < 0) {
    throw std::invalid_argument("count must be 0 (the default) or more; got " +
                                std::to_string(count));
  }
  requested_threads.store(count, std::memory_order_relaxed);
}

void parallel_for(std::int64_t count, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (count <= 0) return;
  const std::int64_t most = (count + grain - 1) / std::max<std::int64_t>(grain, 1);
  const std::int64_t workers = std::clamp<std::int64_t>(num_threads(), 1, most);
  if (workers == 1) {
    body(0, count);
    return;
  }
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto run = [&](std::int64_t worker) {
    try {
      body(count * worker / workers, count * (worker + 1) / workers);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::jthread> threads;
  threads.reserve(static_cast<std::size_t>(workers - 1));
  for (std::int64_t worker = 1; worker < workers; ++worker) threads.emplace_back(run, worker);
  run(0);
  threads.clear();  // joins
  if (failure) std::rethrow_exception(failure);
}

}  // namespace clafusion
