// Threads for the kernels: one loop, split into contiguous ranges.
#pragma once

#include <cstdint>
#include <functional>

namespace clafusion {

// The number of threads a kernel may use: set_num_threads, else CLAFUSION_NUM_THREADS, else the
// number of hardware threads.
int num_threads() noexcept;

// Sets the number of threads for the process; 0 returns to the default.
void set_num_threads(int count);

// Calls body(begin, end) on ranges that cover [0, count) exactly once, each at least `grain` long
// where possible, and waits for all of them. A body's exception is rethrown here, on the caller.
//
// Which thread runs which range is not fixed, so a body must write only to places that its own
// indices own; then the result does not depend on the number of threads.
void parallel_for(std::int64_t count, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace clafusion
