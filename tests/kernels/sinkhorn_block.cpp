// The GPU's inner loops on the host: teams are threads, their memory is the heap.
#include <barrier>
#include <cstring>
#include <deque>
#include <functional>

#include <thread>
#include <vector>

#include "sinkhorn/cuda/launch_plan.hpp"
#include "sinkhorn/cuda/resident.hpp"
#include "sinkhorn/cuda/stream.hpp"

namespace {

using namespace clafusion;

// Threads that meet and put their numbers together.
class Circle {
 public:
  explicit Circle(int size)
      : size_(size), barrier_(size), values_(static_cast<std::size_t>(2 * size)) {}

  void wait() {
    if (size_ > 1) barrier_.arrive_and_wait();
  }

  template <class T, int N, class Combine>
  void combine(int rank, T (&values)[N], const Combine& combine) {
    static_assert(N <= 2 || sizeof(T) == 4);
    if (size_ == 1) return;
    for (int k = 0; k < N; ++k) {
      values_[static_cast<std::size_t>(rank)] = static_cast<double>(values[k]);
      wait();
      T result = static_cast<T>(values_[0]);
      for (int i = 1; i < size_; ++i) {
        result = combine(result, static_cast<T>(values_[static_cast<std::size_t>(i)]));
      }
      wait();
      values[k] = result;
    }
  }

 private:
  int size_;
  std::barrier<> barrier_;
  std::vector<double> values_;
};

class HostLanes {
 public:
  HostLanes(Circle& circle, int rank, int size) : circle_(circle), rank_(rank), size_(size) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  void meet() { circle_.wait(); }
  template <class T, int N>
  void sum(T (&values)[N]) {
    circle_.combine(rank_, values, [](T a, T b) { return a + b; });
  }
  template <class T, int N>
  void max(T (&values)[N]) {
    circle_.combine(rank_, values, [](T a, T b) { return a > b ? a : b; });
  }

 private:
  Circle& circle_;
  int rank_, size_;
};

// What one block, of `threads` threads in groups of `lanes`, shares; and its cluster.
struct Block {
  Block(int threads, int lanes, Circle& cluster_) : cluster(cluster_), all(threads) {
    for (int g = 0; g < threads / lanes; ++g) groups.emplace_back(lanes);
  }
  Circle& cluster;
  Circle all;
  std::deque<Circle> groups;
};

class HostTeam {
 public:
  HostTeam(std::deque<Block>& blocks, std::vector<std::vector<double>>& memories, int peer,
           int rank, int threads, int lanes)
      : block_(blocks[static_cast<std::size_t>(peer)]),
        memories_(memories),
        peer_(peer),
        rank_(rank),
        size_(threads),
        groups_(threads / lanes),
        group_(rank / lanes),
        lanes_(block_.groups[static_cast<std::size_t>(group_)], rank % lanes, lanes) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  int group() const { return group_; }
  int groups() const { return groups_; }
  int peer() const { return peer_; }
  int peers() const { return static_cast<int>(memories_.size()); }
  HostLanes& lanes() { return lanes_; }
  void barrier() { block_.all.wait(); }
  void exchange() { block_.cluster.wait(); }
  template <class T, int N>
  void sum(T (&values)[N]) {
    block_.all.combine(rank_, values, [](T a, T b) { return a + b; });
  }
  template <class T, int N>
  void max(T (&values)[N]) {
    block_.all.combine(rank_, values, [](T a, T b) { return a > b ? a : b; });
  }
  template <class T>
  T* at_peer(T* pointer, int peer) {
    auto* const own = reinterpret_cast<char*>(memory(peer_));
    return reinterpret_cast<T*>(reinterpret_cast<char*>(memory(peer)) +
                                (reinterpret_cast<char*>(pointer) - own));
  }
  double* memory(int peer) { return memories_[static_cast<std::size_t>(peer)].data(); }

 private:
  Block& block_;
  std::vector<std::vector<double>>& memories_;
  int peer_, rank_, size_, groups_, group_;
  HostLanes lanes_;
};

// Runs body(team) on peers * threads threads at once.
void run_teams(int peers, int threads, int lanes, std::int64_t bytes,
               const std::function<void(HostTeam&)>& body) {
  Circle cluster(peers * threads);
  std::deque<Block> blocks;
  for (int p = 0; p < peers; ++p) blocks.emplace_back(threads, lanes, cluster);
  // Memory starts as NaN, as what nobody has written may be anything.
  std::vector<std::vector<double>> memories(
      static_cast<std::size_t>(peers),
      std::vector<double>(static_cast<std::size_t>(bytes / 8 + 1), std::nan("")));
  const auto run = [&](int p, int rank) {
    HostTeam team(blocks, memories, p, rank, threads, lanes);
    body(team);
  };
  std::vector<std::thread> others;
  for (int p = 0; p < peers; ++p) {
    for (int rank = 0; rank < threads; ++rank) {
      if (p + rank > 0) others.emplace_back(run, p, rank);
    }
  }
  run(0, 0);
  for (auto& one : others) one.join();
}

template <int kRows, int kColumns>
void run_resident(const SinkhornTask& task, const SinkhornSettings& settings, int threads,
                  int lanes, int peers) {
  const std::int64_t bytes =
      block::resident_bytes(task.num_source, task.num_target, peers, threads / lanes);
  run_teams(peers, threads, lanes, bytes, [&](HostTeam& team) {
    block::solve_resident<kRows, kColumns>(team, task, settings, team.memory(team.peer()));
  });
}

template <int kRows, int kColumns, bool kWide>
void run_stream(const SinkhornTask& task, const SinkhornSettings& settings, int threads) {
  std::vector<double> workspace(
      static_cast<std::size_t>(block::stream_bytes(task.num_source, task.num_target) / 8),
      std::nan(""));
  const block::StreamMemory memory =
      block::lay_out_stream(workspace.data(), task.num_source, task.num_target);
  const std::int64_t stripes = block::num_stripes(task.num_source);
  const std::int64_t tiles = block::num_tiles(task.num_target);
  // A launch for each step: all its blocks, one after another, the last one first.
  const auto launch = [&](std::int64_t blocks,
                          const std::function<void(HostTeam&, std::int64_t)>& body) {
    run_teams(1, threads, threads, 8 * threads, [&](HostTeam& team) {
      for (std::int64_t i = blocks - 1; i >= 0; --i) body(team, i);
    });
  };
  launch(stripes, [&](HostTeam& t, std::int64_t s) { block::stream_look(t, task, memory, s); });
  bool done = false;
  launch(1, [&](HostTeam& t, std::int64_t) {
    const bool now = block::stream_start(t, task, settings, memory);
    if (t.rank() == 0) done = now;
  });
  while (!done) {
    launch(stripes, [&](HostTeam& t, std::int64_t s) {
      block::stream_stripe<kRows, kColumns, kWide>(t, task, memory, s);
      t.barrier();
    });
    launch(tiles, [&](HostTeam& t, std::int64_t i) {
      block::stream_tile(t, task, memory, i, reinterpret_cast<float*>(t.memory(0)));
    });
    launch(1, [&](HostTeam& t, std::int64_t) {
      const bool now = block::stream_judge(t, task, settings, memory);
      if (t.rank() == 0) done = now;
    });
  }
  launch(stripes,
         [&](HostTeam& t, std::int64_t s) { block::stream_write(t, task, settings, memory, s); });
  launch(1, [&](HostTeam& t, std::int64_t) { block::stream_finish(t, task, memory); });
}

}  // namespace

// Returns false where the columns do not fit the lanes.
extern "C" bool solve(bool stream, bool wide, int threads, int lanes, int peers, const float* cost,
                      std::int64_t n, std::int64_t m, const double* a, const double* b,
                      const double* initial, double epsilon, double tolerance,
                      std::int64_t max_iterations, double relaxation, float* plan, double* f,
                      double* g, double* total, double* error, std::int64_t* iterations,
                      std::int64_t* status) {
  const SinkhornTask task{
      {cost, n, m, a, b, initial}, plan, f, g, total, error, iterations, status};
  const SinkhornSettings settings{epsilon, tolerance, max_iterations, relaxation};
  if (stream && wide) {
    run_stream<4, 2, true>(task, settings, threads);
  } else if (stream && threads * 64 >= m) {
    run_stream<2, 64, false>(task, settings, threads);
  } else if (!stream && lanes * 8 >= m) {
    run_resident<4, 8>(task, settings, threads, lanes, peers);
  } else if (!stream && lanes * 128 >= m) {
    run_resident<2, 128>(task, settings, threads, lanes, peers);
  } else {
    return false;
  }
  return true;
}

// kernel, columns, peers, threads, shared bytes, workspace bytes; false for a shape that is none.
extern "C" bool plan(std::int64_t n, std::int64_t m, std::int64_t shared_bytes, int most_peers,
                     std::int64_t* found) {
  try {
    const SinkhornLaunch launch = plan_launch(n, m, {shared_bytes, most_peers});
    found[0] = static_cast<std::int64_t>(launch.kernel);
    found[1] = launch.columns;
    found[2] = launch.peers;
    found[3] = launch.threads;
    found[4] = launch.shared_bytes;
    found[5] = launch.workspace_bytes;
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}
