#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace safelora {

Threads std_threads(int count) {
  if (count <= 0) count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return {count, [](int n, const std::function<void(int)>& task) {
            std::vector<std::thread> others;
            for (int i = 1; i < n; ++i) others.emplace_back(task, i);
            task(0);
            for (std::thread& other : others) other.join();
          }};
}

namespace detail {

void run_tasks(const Threads& threads, std::int64_t n, const std::function<void(const NextTask&)>& worker) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const NextTask take = [&] {
    const std::int64_t i = next.fetch_add(1);
    return i < n ? i : -1;
  };
  const auto run_worker = [&](int) {
    try {
      worker(take);
    } catch (...) {
      next = n;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  const int workers = static_cast<int>(std::min<std::int64_t>(threads.run ? threads.count : 1, n));
  if (workers <= 1)
    run_worker(0);
  else
    threads.run(workers, run_worker);
  if (error) std::rethrow_exception(error);
}

void parallel_for(const Threads& threads, std::int64_t n, const std::function<void(std::int64_t)>& task) {
  run_tasks(threads, n, [&](const NextTask& next) {
    for (std::int64_t i; (i = next()) >= 0;) task(i);
  });
}

}  // namespace detail
}  // namespace safelora
