#include "common/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace clafusion {
namespace {

constexpr int kMostThreads = 1024;

int hardware_threads() {
#if defined(__linux__)
  cpu_set_t allowed;  // a container or taskset may allow fewer than the machine has
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

int default_num_threads() {
  int count = 0;
  if (const char* text = std::getenv("CLAFUSION_NUM_THREADS")) count = std::atoi(text);
  if (count <= 0) count = hardware_threads();
  return std::clamp(count, 1, kMostThreads);
}

std::atomic<int> requested_threads{0};

// True while this thread runs a body: a parallel_for inside it then runs serially.
thread_local bool inside_body = false;

int process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return static_cast<int>(getpid());
#endif
}

void pause() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Kernels that iterate start the next loop within microseconds of the last one, sooner than a
// sleeping thread wakes up. So a thread looks this often (some 20 us) before it sleeps.
constexpr int kSpins = 1000;

struct Job {
  const std::function<void(std::int64_t, std::int64_t)>& body;
  const std::int64_t count;
  const std::int64_t chunks;
  const int most_helpers;
  // Guarded by the pool's mutex; `unfinished` may be looked at without it.
  std::int64_t next = 0;
  int helpers = 0;
  std::atomic<std::int64_t> unfinished = chunks;
  std::int64_t failed_chunk = 0;
  std::exception_ptr failure = nullptr;
  std::condition_variable done = {};
};

// Threads that live until the process ends and help whoever has posted a loop.
class Pool {
 public:
  const int owner = process_id();

  void run(Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    grow(job.most_helpers);
    jobs_.push_back(&job);
    posted_.fetch_add(1, std::memory_order_release);
    wake_.notify_all();
    while (job.next < job.chunks) run_chunk(job, lock, 0);
    lock.unlock();
    for (int i = 0; i < kSpins && job.unfinished.load(std::memory_order_acquire) > 0; ++i) pause();
    lock.lock();
    job.done.wait(lock, [&] { return job.unfinished.load(std::memory_order_relaxed) == 0; });
  }

 private:
  // Starts the helpers that are missing. Fewer are enough: the caller runs what nobody takes.
  void grow(int helpers) {
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  // Takes one chunk and runs it. Called with the lock held, returns with it held. A job lives
  // while one of its chunks is unfinished; after this call only its owner may touch it.
  void run_chunk(Job& job, std::unique_lock<std::mutex>& lock, int helper) {
    job.helpers += helper;
    const std::int64_t chunk = job.next++;
    if (job.next == job.chunks) std::erase(jobs_, &job);
    lock.unlock();
    std::exception_ptr failure;
    inside_body = true;
    try {
      job.body(job.count * chunk / job.chunks, job.count * (chunk + 1) / job.chunks);
    } catch (...) {
      failure = std::current_exception();
    }
    inside_body = false;
    lock.lock();
    // The first chunk's exception is the one reported, whoever ran it.
    if (failure && (!job.failure || chunk < job.failed_chunk)) {
      job.failure = std::move(failure);
      job.failed_chunk = chunk;
    }
    job.helpers -= helper;
    // Under the lock, so that the owner cannot leave between the count and the call.
    if (job.unfinished.fetch_sub(1, std::memory_order_release) == 1) job.done.notify_all();
  }

  Job* job_in_need() {
    for (Job* job : jobs_) {
      if (job->helpers < job->most_helpers) return job;
    }
    return nullptr;
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      while (Job* job = job_in_need()) run_chunk(*job, lock, 1);
      const std::uint64_t seen = posted_.load(std::memory_order_relaxed);
      lock.unlock();
      for (int i = 0; i < kSpins && posted_.load(std::memory_order_acquire) == seen; ++i) pause();
      lock.lock();
      wake_.wait(lock, [&] { return job_in_need() != nullptr; });
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Job*> jobs_;  // those with a chunk that nobody has taken
  std::atomic<std::uint64_t> posted_ = 0;
  int helpers_ = 0;
};

// The process's pool. Never destroyed: its threads may outlive every static object. A forked
// child has none of its parent's threads, so it makes a pool of its own.
Pool& pool() {
  static std::atomic<Pool*> current = nullptr;
  Pool* found = current.load(std::memory_order_acquire);
  while (found == nullptr || found->owner != process_id()) {
    auto fresh = std::make_unique<Pool>();
    if (current.compare_exchange_strong(found, fresh.get())) found = fresh.release();
  }
  return *found;
}

}  // namespace

int num_threads() noexcept {
  static const int fallback = default_num_threads();
  const int requested = requested_threads.load(std::memory_order_relaxed);
  return requested > 0 ? requested : fallback;
}

void set_num_threads(int count) {
  if (count < 0 || count > kMostThreads) {
    throw std::invalid_argument("count must be 0 (the default) to " + std::to_string(kMostThreads) +
                                "; got " + std::to_string(count));
  }
  requested_threads.store(count, std::memory_order_relaxed);
}

void parallel_for(std::int64_t count, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (count <= 0) return;
  const std::int64_t size = std::max<std::int64_t>(grain, 1);
  const std::int64_t most = (count - 1) / size + 1;
  const std::int64_t workers = std::min<std::int64_t>(num_threads(), most);
  if (workers == 1 || inside_body) {
    body(0, count);
    return;
  }
  // A few chunks for each thread: the machine's other work may hold one of them up.
  Job job{body, count, std::min(most, 4 * workers), static_cast<int>(workers - 1)};
  pool().run(job);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace clafusion
