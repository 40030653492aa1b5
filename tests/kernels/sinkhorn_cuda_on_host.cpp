// sinkhorn/cuda/sinkhorn.cu, whole, on the host: its launches run as fibers.
#include "cuda_runtime.h"

namespace clafusion::kernels {
double* dynamic_memory() { return host_cuda::block->shared.data(); }
void meet_cluster() { host_cuda::wait(host_cuda::cluster->all); }
template <class T>
T* in_cluster(T* pointer, int rank) {
  const auto own = reinterpret_cast<char*>(host_cuda::block->shared.data());
  auto* const other = host_cuda::cluster->blocks[static_cast<std::size_t>(rank)].shared.data();
  return reinterpret_cast<T*>(reinterpret_cast<char*>(other) +
                              (reinterpret_cast<char*>(pointer) - own));
}
}  // namespace clafusion::kernels

#include "sinkhorn/cuda/sinkhorn.cu"

// Solves problems that lie one behind the other. Returns 0, or 1 with a message.
extern "C" int solve_on_host(std::int64_t count, const std::int64_t* shapes, const float* cost,
                             const double* a, const double* b, const double* initial,
                             double epsilon, double tolerance, std::int64_t max_iterations,
                             double relaxation, int shared_bytes, int capability,
                             int failing_launch, float* plan, double* f, double* g, double* totals,
                             double* errors, std::int64_t* iterations, std::int64_t* status,
                             int* launches, char* message) {
  using namespace clafusion;
  host_cuda::shared_bytes = shared_bytes;
  host_cuda::capability = capability;
  host_cuda::failing_launch = failing_launch;
  host_cuda::launches = 0;
  std::vector<SinkhornTask> tasks;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t n = shapes[2 * i], m = shapes[2 * i + 1];
    tasks.push_back({{cost, n, m, a, b, initial},
                     plan,
                     f,
                     g,
                     totals + i,
                     errors + i,
                     iterations + i,
                     status + i});
    cost += n * m;
    plan += n * m;
    a += n;
    f += n;
    b += m;
    g += m;
    if (initial != nullptr) initial += m;
  }
  try {
    const std::int64_t bytes = sinkhorn_cuda_workspace(shapes, count, 0);
    // One more byte at the end, to see that nothing is written beyond.
    std::vector<char> memory(static_cast<std::size_t>(bytes + 257), '\x7f');
    char* start = memory.data();
    while (reinterpret_cast<std::uintptr_t>(start) % 256 != 0) ++start;
    sinkhorn_cuda(tasks.data(), count, {epsilon, tolerance, max_iterations, relaxation},
                  {0, nullptr, start, bytes}, [] { return false; });
    *launches = host_cuda::launches;
    if (start[bytes] != '\x7f') throw std::runtime_error("wrote beyond the workspace");
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), 199);
    return 1;
  }
  return 0;
}
