// CUDA as far as our kernels use it, on the host: a block's threads are fibers that take turns,
// blocks run one after another, device memory is the heap. Only for tests of the very same .cu
// source.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

inline dim3 threadIdx, blockIdx, blockDim;

namespace host_cuda {

inline constexpr std::size_t kStack = 64 * 1024;

// Where all of `size` fibers meet.
struct Barrier {
  int size = 0;
  int arrived = 0;
  int round = 0;
};

struct Fiber {
  ucontext_t context;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<double> shuffled;
  std::vector<double> shared;
};

// Blocks that run at the same time.
struct Cluster {
  std::vector<Block> blocks;
  Barrier all;
  ucontext_t scheduler;
  std::function<void()> body;
};

inline Cluster* cluster = nullptr;
inline Block* block = nullptr;  // the one whose thread has its turn
inline std::vector<std::unique_ptr<char[]>> stacks;

inline void yield() { swapcontext(&block->fibers[threadIdx.x].context, &cluster->scheduler); }

inline void wait(Barrier& barrier) {
  const int round = barrier.round;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) yield();
}

inline void enter() {
  cluster->body();
  block->fibers[threadIdx.x].done = true;
  yield();
}

// Runs the threads of `count` blocks from `first` on, the last one first, until all have returned.
// A kernel must not leave threads at a barrier: this would never end.
inline void run_cluster(unsigned first, unsigned count, unsigned threads, std::size_t shared,
                        const std::function<void()>& body) {
  Cluster whole;
  cluster = &whole;
  whole.body = body;
  whole.all.size = static_cast<int>(count * threads);
  whole.blocks.resize(count);
  blockDim.x = threads;
  while (stacks.size() < count * threads) stacks.push_back(std::make_unique<char[]>(kStack));
  std::size_t used = 0;
  for (Block& one : whole.blocks) {
    one.fibers.resize(threads);
    one.warps.resize(threads / 32);
    for (Barrier& warp : one.warps) warp.size = 32;
    one.all.size = static_cast<int>(threads);
    one.shuffled.resize(threads);
    one.shared.assign(shared / 8 + 1, std::numeric_limits<double>::quiet_NaN());
    for (Fiber& fiber : one.fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks[used++].get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &enter, 0);
    }
  }
  for (bool left = true; left;) {
    left = false;
    for (unsigned b = count; b-- > 0;) {
      for (unsigned i = threads; i-- > 0;) {
        block = &whole.blocks[b];
        if (block->fibers[i].done) continue;
        left = true;
        blockIdx.x = first + b;
        threadIdx.x = i;
        swapcontext(&whole.scheduler, &block->fibers[i].context);
      }
    }
  }
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::wait(host_cuda::block->all); }
inline void __syncwarp() { host_cuda::wait(host_cuda::block->warps[threadIdx.x / 32]); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  auto& shuffled = host_cuda::block->shuffled;
  const std::size_t own = threadIdx.x;
  shuffled[own] = static_cast<double>(value);
  __syncwarp();
  const T result = static_cast<T>(shuffled[own ^ static_cast<std::size_t>(distance)]);
  __syncwarp();
  return result;
}

inline int atomicSub(int* where, int value) {
  const int before = *where;
  *where -= value;
  return before;
}

// --- the runtime ---

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaDeviceProp {
  char name[16];
};

namespace host_cuda {
inline int shared_bytes = 101'376;
inline int capability = 8;
inline int failing_launch = -1;  // the number of the launch that fails
inline int launches = 0;
}  // namespace host_cuda

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorLaunchFailure"; }
inline const char* cudaGetErrorString(cudaError_t) { return "unspecified launch failure"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "host");
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? host_cuda::capability
                                                          : host_cuda::shared_bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t*) {
  return *count = 1, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (host_cuda::launches++ == host_cuda::failing_launch) return cudaErrorLaunchFailure;
  const unsigned size = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  for (unsigned i = config->gridDim.x / size; i-- > 0;) {
    host_cuda::run_cluster(i * size, size, config->blockDim.x, config->dynamicSmemBytes,
                           [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}
