// Work distribution that never shows in the result: tasks are fixed by the shapes, only who runs them varies.
#pragma once

#include <cstdint>
#include <functional>

#include "safelora/kernels.h"

namespace safelora::detail {

// Hands out tasks 0 … n-1 in order: `worker` runs on several threads, keeps its scratch, and calls next() until it
// returns -1. The first exception stops the hand-out and is rethrown here.
using NextTask = std::function<std::int64_t()>;
void run_tasks(const Threads& threads, std::int64_t n, const std::function<void(const NextTask&)>& worker);

// The same for tasks without scratch.
void parallel_for(const Threads& threads, std::int64_t n, const std::function<void(std::int64_t)>& task);

}  // namespace safelora::detail
