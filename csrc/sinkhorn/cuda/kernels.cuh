// The CUDA kernels of Sinkhorn's iteration: teams made of threads, around the inner loops.
#pragma once

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

#include "sinkhorn/cuda/resident.hpp"
#include "sinkhorn/cuda/stream.hpp"

namespace clafusion::kernels {

inline constexpr unsigned kFull = 0xffffffffu;
inline constexpr int kMostValues = 4;  // put together at once
inline constexpr int kMostWarps = 32;
inline constexpr int kSmallBlock = 256;  // threads of the kernels that do little
inline constexpr int kScratchDoubles = 2 * kMostValues * kMostWarps;
inline constexpr std::int64_t kScratchBytes = kScratchDoubles * std::int64_t{sizeof(double)};

#if defined(__CUDACC__)
__device__ inline double* dynamic_memory() {
  extern __shared__ double memory[];
  return memory;
}

// Waits for all blocks of the cluster.
__device__ inline void meet_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// Where the cluster's block of this rank has what `pointer` points to in this one's shared memory.
template <class T>
__device__ T* in_cluster(T* pointer, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#else
  return pointer;
#endif
}
#endif  // else the tests, which run these kernels on the host, have theirs

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
  __device__ float neutral() const { return 0.0f; }
};

struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
  __device__ float neutral() const { return -block::infinity(); }
};

// Each step pairs numbers the same way on both sides, so that all lanes end with the same bits.
template <class T, int N, class Combine>
__device__ __forceinline__ void combine_in_warp(T (&values)[N], const Combine& combine) {
  CLAFUSION_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) {
    CLAFUSION_UNROLL
    for (int k = 0; k < N; ++k) {
      values[k] = combine(values[k], __shfl_xor_sync(kFull, values[k], distance));
    }
  }
}

struct WarpLanes {
  __device__ int rank() const { return static_cast<int>(threadIdx.x) % 32; }
  __device__ int size() const { return 32; }
  template <class T, int N>
  __device__ void sum(T (&values)[N]) {
    combine_in_warp(values, Sum{});
  }
  template <class T, int N>
  __device__ void max(T (&values)[N]) {
    combine_in_warp(values, Max{});
  }
  __device__ void meet() const { __syncwarp(); }
};

// All threads of the block. Known beforehand, their number makes addresses constant offsets.
template <int kThreads = 0>
class BlockTeam {
 public:
  __device__ explicit BlockTeam(double* scratch) : scratch_(scratch) {}
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return kThreads > 0 ? kThreads : static_cast<int>(blockDim.x); }
  __device__ void barrier() const { __syncthreads(); }
  template <class T, int N>
  __device__ void sum(T (&values)[N]) {
    combine(values, Sum{});
  }
  template <class T, int N>
  __device__ void max(T (&values)[N]) {
    combine(values, Max{});
  }

 private:
  // Two buffers in turns: who writes one has seen all threads leave it, at the barrier between.
  template <class T, int N, class Combine>
  __device__ void combine(T (&values)[N], const Combine& combine) {
    static_assert(N <= kMostValues);
    combine_in_warp(values, combine);
    T* const buffer = reinterpret_cast<T*>(scratch_ + turn_ * kMostValues * kMostWarps);
    turn_ ^= 1;
    const int warp = rank() / 32;
    if (rank() % 32 == 0) {
      CLAFUSION_UNROLL
      for (int k = 0; k < N; ++k) buffer[k * kMostWarps + warp] = values[k];
    }
    __syncthreads();
    const int lane = rank() % 32;
    CLAFUSION_UNROLL
    for (int k = 0; k < N; ++k) {
      values[k] =
          lane < size() / 32 ? buffer[k * kMostWarps + lane] : static_cast<T>(combine.neutral());
    }
    combine_in_warp(values, combine);
  }

  double* scratch_;
  int turn_ = 0;
};

// A block whose warps take a row each, and, with others, a cluster.
class ResidentTeam : public BlockTeam<> {
 public:
  __device__ ResidentTeam(double* scratch, int peers)
      : BlockTeam(scratch), peers_(peers), peer_(static_cast<int>(blockIdx.x) % peers) {}
  __device__ int group() const { return rank() / 32; }
  __device__ int groups() const { return size() / 32; }
  __device__ WarpLanes& lanes() { return lanes_; }
  __device__ int peer() const { return peer_; }
  __device__ int peers() const { return peers_; }
  __device__ void exchange() const {
    if (peers_ > 1) {
      meet_cluster();
    } else {
      __syncthreads();
    }
  }
  template <class T>
  __device__ T* at_peer(T* pointer, int peer) const {
    return peers_ > 1 ? in_cluster(pointer, peer) : pointer;
  }

 private:
  WarpLanes lanes_;
  int peers_, peer_;
};

// A block all of whose threads share each row.
template <int kThreads>
class StreamTeam : public BlockTeam<kThreads> {
 public:
  using BlockTeam<kThreads>::BlockTeam;
  __device__ StreamTeam& lanes() { return *this; }
  __device__ void meet() const {}  // its sums have barriers
};

// Blocks `peers` apart solve a problem together; a cluster's blocks have numbers in a row.
template <int kRows, int kColumns>
__global__ void __launch_bounds__(512)
    sinkhorn_resident(const SinkhornTask* tasks, SinkhornSettings settings, int peers) {
  double* const memory = dynamic_memory();
  ResidentTeam team(memory, peers);
  block::solve_resident<kRows, kColumns>(team, tasks[static_cast<int>(blockIdx.x) / peers],
                                         settings, memory + kScratchDoubles);
}

// A problem of the streaming kernels.
struct StreamTask {
  SinkhornTask task;
  void* memory;
};

__device__ inline block::StreamMemory memory_of(const StreamTask& one) {
  return block::lay_out_stream(one.memory, one.task.num_source, one.task.num_target);
}

// In the kernels below `parts` is the largest number of stripes or tiles of a problem.
__global__ void __launch_bounds__(kSmallBlock) sinkhorn_look(const StreamTask* tasks, int parts) {
  __shared__ double scratch[kScratchDoubles];
  StreamTeam<kSmallBlock> team(scratch);
  const StreamTask& one = tasks[static_cast<int>(blockIdx.x) / parts];
  const int stripe = static_cast<int>(blockIdx.x) % parts;
  if (stripe >= block::num_stripes(one.task.num_source)) return;
  block::stream_look(team, one.task, memory_of(one), stripe);
}

__global__ void __launch_bounds__(kSmallBlock)
    sinkhorn_start(const StreamTask* tasks, SinkhornSettings settings, int* pending) {
  __shared__ double scratch[kScratchDoubles];
  StreamTeam<kSmallBlock> team(scratch);
  const StreamTask& one = tasks[blockIdx.x];
  const bool done = block::stream_start(team, one.task, settings, memory_of(one));
  if (done && team.rank() == 0) atomicSub(pending, 1);
}

template <int kThreads, int kRows, int kColumns, bool kWide>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    sinkhorn_stripe(const StreamTask* tasks, int parts) {
  __shared__ double scratch[kScratchDoubles];
  StreamTeam<kThreads> team(scratch);
  const StreamTask& one = tasks[static_cast<int>(blockIdx.x) / parts];
  const int stripe = static_cast<int>(blockIdx.x) % parts;
  if (stripe >= block::num_stripes(one.task.num_source)) return;
  block::stream_stripe<kRows, kColumns, kWide>(team, one.task, memory_of(one), stripe);
}

__global__ void __launch_bounds__(kSmallBlock) sinkhorn_tile(const StreamTask* tasks, int parts) {
  __shared__ double scratch[kScratchDoubles];
  __shared__ float columns[kSmallBlock];
  StreamTeam<kSmallBlock> team(scratch);
  const StreamTask& one = tasks[static_cast<int>(blockIdx.x) / parts];
  const int tile = static_cast<int>(blockIdx.x) % parts;
  if (tile >= block::num_tiles(one.task.num_target)) return;
  block::stream_tile(team, one.task, memory_of(one), tile, columns);
}

__global__ void __launch_bounds__(kSmallBlock)
    sinkhorn_judge(const StreamTask* tasks, SinkhornSettings settings, int* pending) {
  __shared__ double scratch[kScratchDoubles];
  StreamTeam<kSmallBlock> team(scratch);
  const StreamTask& one = tasks[blockIdx.x];
  const bool done = block::stream_judge(team, one.task, settings, memory_of(one));
  if (done && team.rank() == 0) atomicSub(pending, 1);
}

__global__ void __launch_bounds__(kSmallBlock)
    sinkhorn_write(const StreamTask* tasks, SinkhornSettings settings, int parts) {
  __shared__ double scratch[kScratchDoubles];
  StreamTeam<kSmallBlock> team(scratch);
  const StreamTask& one = tasks[static_cast<int>(blockIdx.x) / parts];
  const int stripe = static_cast<int>(blockIdx.x) % parts;
  if (stripe >= block::num_stripes(one.task.num_source)) return;
  block::stream_write(team, one.task, settings, memory_of(one), stripe);
}

__global__ void __launch_bounds__(kSmallBlock) sinkhorn_finish(const StreamTask* tasks) {
  __shared__ double scratch[kScratchDoubles];
  StreamTeam<kSmallBlock> team(scratch);
  const StreamTask& one = tasks[blockIdx.x];
  block::stream_finish(team, one.task, memory_of(one));
}

}  // namespace clafusion::kernels
