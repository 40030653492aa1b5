#include "sinkhorn/cuda/sinkhorn.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "common/cuda.hpp"
#include "sinkhorn/cuda/kernels.cuh"

namespace clafusion {
namespace {

using kernels::kSmallBlock;
using kernels::StreamTask;

// Iterations between two looks at whether all problems are done.
constexpr int kRounds = 16;
constexpr std::int64_t kAlignment = 256;

using ResidentKernel = void (*)(const SinkhornTask*, SinkhornSettings, int);

// Few columns a lane leave registers for more rows at once, whose waiting overlaps.
ResidentKernel resident_kernel(int columns) {
  switch (columns) {
    case 4: return kernels::sinkhorn_resident<4, 4>;
    case 8: return kernels::sinkhorn_resident<4, 8>;
    case 16: return kernels::sinkhorn_resident<2, 16>;
    default: return kernels::sinkhorn_resident<1, 32>;
  }
}

using StripeKernel = void (*)(const StreamTask*, int);

StripeKernel stripe_kernel(const SinkhornLaunch& launch) {
  constexpr int kColumns = kStreamColumns;
  if (launch.columns == 0) return kernels::sinkhorn_stripe<kStreamThreads, 2, kColumns, true>;
  return launch.threads == kFewStreamThreads
             ? kernels::sinkhorn_stripe<kFewStreamThreads, 2, kColumns, false>
             : kernels::sinkhorn_stripe<kStreamThreads, 2, kColumns, false>;
}

std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Problems that share their launches: places in `order`.
struct Group {
  SinkhornLaunch launch;
  std::int64_t first;
  std::int64_t count;
};

// The problems by kernel, the order of equals kept.
struct Schedule {
  std::vector<SinkhornLaunch> launches;
  std::vector<std::int64_t> order;
  std::vector<Group> groups;
  std::int64_t streams = 0;  // how many problems are streamed

  template <class Shape>
  Schedule(std::int64_t count, const DeviceLimits& device, const Shape& shape) {
    for (std::int64_t i = 0; i < count; ++i) {
      const auto [n, m] = shape(i);
      launches.push_back(plan_launch(n, m, device));
    }
    order.resize(static_cast<std::size_t>(count));
    std::iota(order.begin(), order.end(), std::int64_t{0});
    const auto key = [&](std::int64_t i) {
      const SinkhornLaunch& one = launches[i];
      return std::tuple(one.kernel, one.columns, one.peers, one.threads);
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t a, std::int64_t b) { return key(a) < key(b); });
    for (std::int64_t place = 0; place < count; ++place) {
      const SinkhornLaunch& one = launches[order[place]];
      if (one.kernel == SinkhornKernel::stream) ++streams;
      if (groups.empty() || !groups.back().launch.shares_launch(one)) {
        groups.push_back({one, place, 0});
      }
      Group& group = groups.back();
      ++group.count;
      group.launch.shared_bytes = std::max(group.launch.shared_bytes, one.shared_bytes);
    }
  }

  // The workspace: resident tasks, stream tasks, the count of unfinished problems, and each
  // streamed problem's memory.
  std::int64_t head_bytes() const {
    const auto residents = static_cast<std::int64_t>(order.size()) - streams;
    return aligned(residents * static_cast<std::int64_t>(sizeof(SinkhornTask))) +
           aligned(streams * static_cast<std::int64_t>(sizeof(StreamTask))) + kAlignment;
  }

  std::int64_t bytes() const {
    std::int64_t total = head_bytes();
    for (const SinkhornLaunch& one : launches) total += aligned(one.workspace_bytes);
    return total;
  }
};

// Where the workspace holds what.
struct DeviceTasks {
  const SinkhornTask* residents;  // in the schedule's order, in which they come first
  const StreamTask* streams;      // likewise, after them
  int* pending;                   // the count of unfinished streamed problems
};

DeviceTasks upload_tasks(const SinkhornTask* tasks, const Schedule& schedule,
                         const CudaCall& call) {
  const auto count = static_cast<std::int64_t>(schedule.order.size());
  const std::int64_t residents = count - schedule.streams;
  std::vector<SinkhornTask> resident_tasks;
  std::vector<StreamTask> stream_tasks;
  char* const base = static_cast<char*>(call.workspace);
  char* free = base + schedule.head_bytes();
  for (std::int64_t place = 0; place < count; ++place) {
    const std::int64_t i = schedule.order[place];
    if (place < residents) {
      resident_tasks.push_back(tasks[i]);
    } else {
      stream_tasks.push_back({tasks[i], free});
      free += aligned(schedule.launches[i].workspace_bytes);
    }
  }
  auto* const resident_at = reinterpret_cast<SinkhornTask*>(base);
  auto* const stream_at = reinterpret_cast<StreamTask*>(
      base + aligned(residents * static_cast<std::int64_t>(sizeof(SinkhornTask))));
  const auto upload = [&](void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    // From memory that is not pinned, the copy is made, or staged, before this returns.
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice,
                                static_cast<cudaStream_t>(call.stream)),
                "copying the problems' addresses");
  };
  upload(resident_at, resident_tasks.data(), resident_tasks.size() * sizeof(SinkhornTask));
  upload(stream_at, stream_tasks.data(), stream_tasks.size() * sizeof(StreamTask));
  return {resident_at, stream_at,
          reinterpret_cast<int*>(base + schedule.head_bytes() - kAlignment)};
}

void launch_residents(const Group& group, const SinkhornTask* tasks,
                      const SinkhornSettings& settings, const DeviceLimits& device,
                      cudaStream_t stream) {
  const SinkhornLaunch& launch = group.launch;
  const ResidentKernel kernel = resident_kernel(launch.columns);
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(device.shared_bytes + kernels::kScratchBytes)),
              "preparing the CUDA kernel sinkhorn_resident");
  cuda::launch("sinkhorn_resident", kernel,
               {group.count * launch.peers, launch.threads,
                launch.shared_bytes + kernels::kScratchBytes, launch.peers},
               stream, tasks, settings, launch.peers);
}

// A group of streamed problems on the device.
struct Stream {
  Group group;
  const StreamTask* tasks;
  int stripes;  // at most, a problem
  int tiles;
};

Stream stream_of(const Group& group, const SinkhornTask* tasks, const Schedule& schedule,
                 const DeviceTasks& at) {
  const auto residents = static_cast<std::int64_t>(schedule.order.size()) - schedule.streams;
  Stream one{group, at.streams + (group.first - residents), 0, 0};
  for (std::int64_t place = group.first; place < group.first + group.count; ++place) {
    const SinkhornTask& task = tasks[schedule.order[place]];
    one.stripes = std::max(one.stripes, static_cast<int>(block::num_stripes(task.num_source)));
    one.tiles = std::max(one.tiles, static_cast<int>(block::num_tiles(task.num_target)));
  }
  return one;
}

void iterate_once(const Stream& one, const SinkhornSettings& settings, int* pending,
                  cudaStream_t stream) {
  cuda::launch("sinkhorn_stripe", stripe_kernel(one.group.launch),
               {one.group.count * one.stripes, one.group.launch.threads}, stream, one.tasks,
               one.stripes);
  cuda::launch("sinkhorn_tile", kernels::sinkhorn_tile, {one.group.count * one.tiles, kSmallBlock},
               stream, one.tasks, one.tiles);
  cuda::launch("sinkhorn_judge", kernels::sinkhorn_judge, {one.group.count, kSmallBlock}, stream,
               one.tasks, settings, pending);
}

void solve_streams(const std::vector<Stream>& streams, std::int64_t count,
                   const SinkhornSettings& settings, int* pending, cudaStream_t stream,
                   const std::function<bool()>& interrupted) {
  int left = static_cast<int>(count);
  cuda::check(cudaMemcpyAsync(pending, &left, sizeof(left), cudaMemcpyHostToDevice, stream),
              "setting the count of unfinished problems");
  for (const Stream& one : streams) {
    cuda::launch("sinkhorn_look", kernels::sinkhorn_look,
                 {one.group.count * one.stripes, kSmallBlock}, stream, one.tasks, one.stripes);
    cuda::launch("sinkhorn_start", kernels::sinkhorn_start, {one.group.count, kSmallBlock}, stream,
                 one.tasks, settings, pending);
  }
  while (left > 0) {
    if (interrupted()) return;
    for (int round = 0; round < kRounds; ++round) {
      for (const Stream& one : streams) iterate_once(one, settings, pending, stream);
    }
    cuda::check(cudaMemcpyAsync(&left, pending, sizeof(left), cudaMemcpyDeviceToHost, stream),
                "reading the count of unfinished problems");
    cuda::check(cudaStreamSynchronize(stream),
                "waiting for the kernels sinkhorn_stripe, "
                "sinkhorn_tile and sinkhorn_judge");
  }
  for (const Stream& one : streams) {
    cuda::launch("sinkhorn_write", kernels::sinkhorn_write,
                 {one.group.count * one.stripes, kSmallBlock}, stream, one.tasks, settings,
                 one.stripes);
    cuda::launch("sinkhorn_finish", kernels::sinkhorn_finish, {one.group.count, kSmallBlock},
                 stream, one.tasks);
  }
}

}  // namespace

DeviceLimits cuda_device_limits(int device) {
  cuda::check(cudaSetDevice(device), "choosing the CUDA device");
  int bytes = 0, major = 0;
  cuda::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
              "asking the device for its shared memory");
  cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
              "asking the device for its compute capability");
  DeviceLimits limits{bytes - kernels::kScratchBytes, 1};
  if (major < 9) return limits;
  // A slice of a device may have too few multiprocessors side by side for the largest cluster.
  const ResidentKernel kernel = resident_kernel(32);
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "preparing the CUDA kernel sinkhorn_resident");
  for (int peers = 8; peers > 1; peers /= 2) {
    const cuda::LaunchConfig launch({peers, 512, bytes, peers}, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess &&
        clusters > 0) {
      limits.most_peers = peers;
      break;
    }
    cudaGetLastError();  // "no such cluster" is an answer
  }
  return limits;
}

std::int64_t sinkhorn_cuda_workspace(const std::int64_t* shapes, std::int64_t count, int device) {
  const DeviceLimits limits = cuda_device_limits(device);
  return Schedule(count, limits,
                  [&](std::int64_t i) { return std::pair(shapes[2 * i], shapes[2 * i + 1]); })
      .bytes();
}

void sinkhorn_cuda(const SinkhornTask* tasks, std::int64_t count, const SinkhornSettings& settings,
                   const CudaCall& call, const std::function<bool()>& interrupted) {
  require_valid(settings);
  if (count == 0) return;
  const auto stream = static_cast<cudaStream_t>(call.stream);
  const DeviceLimits device = cuda_device_limits(call.device);
  const Schedule schedule(count, device, [&](std::int64_t i) {
    return std::pair(tasks[i].num_source, tasks[i].num_target);
  });
  if (call.workspace_bytes < schedule.bytes()) {
    throw std::invalid_argument("the workspace must have " + std::to_string(schedule.bytes()) +
                                " bytes; got " + std::to_string(call.workspace_bytes));
  }
  if (reinterpret_cast<std::uintptr_t>(call.workspace) % kAlignment != 0) {
    throw std::invalid_argument("the workspace must be aligned to 256 bytes");
  }

  const DeviceTasks at = upload_tasks(tasks, schedule, call);
  std::vector<Stream> streams;
  for (const Group& group : schedule.groups) {
    if (group.launch.kernel == SinkhornKernel::resident) {
      launch_residents(group, at.residents + group.first, settings, device, stream);
    } else {
      streams.push_back(stream_of(group, tasks, schedule, at));
    }
  }
  if (!streams.empty()) {
    solve_streams(streams, schedule.streams, settings, at.pending, stream, interrupted);
  }
}

int cuda_device_count(std::string* reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  *reason = cudaGetErrorString(error);
  return 0;
}

std::string cuda_device_name(int device) {
  cudaDeviceProp properties{};
  cuda::check(cudaGetDeviceProperties(&properties, device), "asking the device for its name");
  return properties.name;
}

int cuda_runtime_version() {
  int version = 0;
  cuda::check(cudaRuntimeGetVersion(&version), "asking for the CUDA runtime's version");
  return version;
}

}  // namespace clafusion
