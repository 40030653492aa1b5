// Threads for the kernels: one loop, split into contiguous ranges.
#pragma once

#include <cstdint>
#include <functional>

namespace clafusion {

// The number of threads a kernel may use: set_num_threads, else CLAFUSION_NUM_THREADS, else the
// number of hardware threads.
int num_threads() noexcept;

// Sets the number of threads for the process; 0 returns to the default. Throws
// std::invalid_argument when the number is negative or absurd.
void set_num_threads(int count);

// Calls body(begin, end) on ranges that cover [0, count) exactly once, each at least `grain` long
// where possible, and waits for all of them. Every range is run even if one throws; then the first
// range's exception is rethrown here, on the caller. A parallel_for inside a body runs serially.
//
// The threads are kept from call to call. Callers on several threads share them. A forked child
// starts its own.
//
// Which thread runs which range is not fixed, and the ranges depend on the number of threads: a
// body must write only to places that its own indices own, and each index's result must not depend
// on its range. Then the result does not depend on the number of threads.
void parallel_for(std::int64_t count, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace clafusion
