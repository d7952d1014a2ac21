// X − U(UᵀX) and X − (XU)Uᵀ over many small matrices: one task per 16 columns (left) or 64 rows (right) of one X.
#include "project_out.h"

#include "parallel.h"

namespace safelora {
namespace {

using namespace detail;

constexpr std::int64_t kRightRows = 64;

template <class T>
struct Scratch {
  Buffer<T> basis, basis_panels, x, coefficients;
};

template <class T>
bool in_compute_type(const ConstMatrix& m) {
  return m.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
}

// Whether 16 columns of the result can be worked on where they lie.
template <class T>
bool in_place(const ProjectOutItem& item, std::int64_t j) {
  return in_compute_type<T>(item.out) && item.out.col_stride == 1 && item.out.cols - j >= kLanes;
}

template <class T>
Next<T> wanted(const ProjectOutItem& item, std::int64_t j, const ProjectOutItem& current) {
  if (item.x.rows != current.x.rows || !in_place<T>(item, j) || item.x.dtype != item.out.dtype) return {};
  Next<T> next = {{static_cast<const T*>(item.x.data) + j, item.x.row_stride}, {}};
  if (next.x.row != kLanes) next.x.data = nullptr;  // other strides: lines in between would come along
  if (item.basis.data != current.basis.data && in_compute_type<T>(item.basis))
    next.basis = {static_cast<const T*>(item.basis.data), item.basis.cols};
  return next;
}

template <class T>
void left_columns(const ProjectOutItem& item, std::int64_t j, const Next<T>& next, Scratch<T>& scratch) {
  const std::int64_t rows = item.x.rows, cols = std::min(kLanes, item.x.cols - j), k = item.basis.cols;
  const T* basis = dense(item.basis, scratch.basis);
  T* out = static_cast<T*>(item.out.data) + j;
  if (in_place<T>(item, j)) {
    if (item.out.data != item.x.data) kernels<T>().load(item.x, 0, rows, j, cols, out, item.out.row_stride);
    project_out_panel(out, item.out.row_stride, rows, basis, k, scratch.coefficients, next);
    return;
  }
  scratch.x.reserve(rows * kLanes);
  T* x = scratch.x.get();
  if (cols < kLanes) std::fill(x, x + rows * kLanes, T(0));
  kernels<T>().load(item.x, 0, rows, j, cols, x, kLanes);
  project_out_panel(x, kLanes, rows, basis, k, scratch.coefficients);
  kernels<T>().store(x, kLanes, item.out, 0, rows, j, cols);
}

template <class T>
void right_rows(const ProjectOutItem& item, std::int64_t i, Scratch<T>& scratch) {
  const Kernels<T>& kernel = kernels<T>();
  const std::int64_t rows = std::min(kRightRows, item.x.rows - i), d = item.x.cols, k = item.basis.cols;
  const std::int64_t ld = round_up(d, kLanes), k_panels = ceil_div(k, kLanes), k_ld = k_panels * kLanes;
  scratch.x.reserve(rows * ld);
  scratch.basis.reserve(k_panels * d * kLanes);
  scratch.basis_panels.reserve(k_ld * ld);
  scratch.coefficients.reserve(rows * k_ld);
  T *x = scratch.x.get(), *u = scratch.basis.get(), *ut = scratch.basis_panels.get(), *c = scratch.coefficients.get();
  std::fill(x, x + rows * ld, T(0));
  kernel.load(item.x, i, rows, 0, d, x, ld);
  load_panels(item.basis, u, d);
  load_panels(transposed(item.basis), ut, k_ld);
  for (std::int64_t p = 0; p < k_panels; ++p)
    kernel.gemm16(rows, d, x, ld, 1, u + p * d * kLanes, kLanes, c + p * kLanes, k_ld, false);
  for (std::int64_t l = 0; l < rows * k_ld; ++l) c[l] = -c[l];
  for (std::int64_t j = 0; j < ld; j += kLanes)
    kernel.gemm16(rows, k_ld, c, k_ld, 1, ut + j * k_ld, kLanes, x + j, ld, true);
  kernel.store(x, ld, item.out, i, rows, 0, d);
}

struct Task {
  const ProjectOutItem* item;
  std::int64_t start;
};

template <class T>
void run_items(const std::vector<ProjectOutItem>& items, Side side, const Threads& threads) {
  std::vector<Task> tasks;
  for (const ProjectOutItem& item : items) {
    if ((has_f64(item.x) || has_f64(item.basis)) != std::is_same_v<T, double>) continue;
    const std::int64_t extent = side == Side::left ? item.x.cols : item.x.rows;
    for (std::int64_t i = 0; i < extent; i += side == Side::left ? kLanes : kRightRows) tasks.push_back({&item, i});
  }
  const std::int64_t n = static_cast<std::int64_t>(tasks.size());
  // tasks a thread takes at once: the next one is then known, and its memory asked for
  const std::int64_t length = std::clamp<std::int64_t>(n / (8 * threads.count), 1, 16);
  run_tasks(threads, ceil_div(n, length), [&](const NextTask& next) {
    Scratch<T> scratch;
    for (std::int64_t run; (run = next()) >= 0;)
      for (std::int64_t i = run * length; i < std::min(n, (run + 1) * length); ++i) {
        const Task &task = tasks[i], &after = tasks[std::min(i + 1, n - 1)];
        if (side == Side::left)
          left_columns(*task.item, task.start, wanted<T>(*after.item, after.start, *task.item), scratch);
        else
          right_rows(*task.item, task.start, scratch);
      }
  });
}

}  // namespace

void project_out(const std::vector<ProjectOutItem>& items, Side side, const Threads& threads) {
  run_items<float>(items, side, threads);
  run_items<double>(items, side, threads);
}

}  // namespace safelora
