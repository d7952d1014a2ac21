// X − U(UᵀX) over many small matrices. See project_out.cuh.
#include "project_out.cuh"
#include "tile.cuh"

namespace safelora::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

SAFELORA_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

// One task: a chunk of rows of a unit of columns. Only three numbers are held; the rest is worked out where it is used.
template <int WIDTH>
struct Work {
  const ProjectOutParams* params;
  int number, unit, chunk;  // of the item, and within it

  SAFELORA_DEVICE const ProjectOutEntry& item() const { return params->items[fresh(number)]; }
  SAFELORA_DEVICE int chunks() const { return (item().d + item().chunk_rows - 1) / item().chunk_rows; }
  SAFELORA_DEVICE int padded_k() const { return (item().k + kBasisPanel - 1) / kBasisPanel * kBasisPanel; }
  SAFELORA_DEVICE int begin() const { return fresh(chunk) * item().chunk_rows; }
  SAFELORA_DEVICE int end() const {
    return item().d - begin() < item().chunk_rows ? item().d : begin() + item().chunk_rows;
  }
  SAFELORA_DEVICE int col() const { return fresh(unit) * WIDTH; }
  // arrivals, and then whether C is there
  SAFELORA_DEVICE unsigned* state() const { return params->counters + 1 + 2 * (item().first_unit + fresh(unit)); }
  // Indices in the workspace: of C, and of the part that a chunk adds to it.
  SAFELORA_DEVICE std::int64_t coefficients() const {
    return item().partials + static_cast<std::int64_t>(fresh(unit)) * padded_k() * WIDTH;
  }
  SAFELORA_DEVICE std::int64_t part(int of_chunk) const {
    const int units = (item().m + WIDTH - 1) / WIDTH;
    return item().partials +
           (units + static_cast<std::int64_t>(fresh(unit)) * chunks() + of_chunk) * padded_k() * WIDTH;
  }
};

template <int WIDTH>
SAFELORA_DEVICE Work<WIDTH> work_of(const ProjectOutParams& p, int task) {
  const int number = item_of(p.items, p.num_items, task);
  const ProjectOutEntry& item = p.items[number];
  const int local = task - item.first_block, chunks = (item.d + item.chunk_rows - 1) / item.chunk_rows;
  return {&p, number, local / chunks, local % chunks};
}

// workspace[part of the chunk] = U[rows]ᵀ X[rows]. Each warp takes some of the rows; their sums are added in order.
template <class T, int WIDTH, bool TRANSPOSED>
SAFELORA_DEVICE void multiply_rows(T* workspace, const Work<WIDTH>& work, T* shared) {
  constexpr int kAcross = 16, kSplits = kWarps * kAcross / WIDTH;
  constexpr int MT = kBasisPanel / 16, NT = kAcross / 8, kDepth = kChunkRows / kSplits;
  T *basis = shared, *x = basis + kChunkRows * kBasisPanel;
  const int part = warp_id() % kSplits, n0 = warp_id() / kSplits * kAcross;
#pragma unroll 1
  for (int k0 = 0; k0 < work.padded_k(); k0 += kBasisPanel) {
    T acc[MT][NT][4] = {};
#pragma unroll 1
    for (int row = work.begin(); row < work.end(); row += kChunkRows) {
      const ProjectOutEntry& item = work.item();
      __syncthreads();
      stage<T, kChunkRows, kBasisPanel>(basis, item.basis, row, k0, work.end(), item.k);
      if constexpr (TRANSPOSED)
        stage<T, WIDTH, kChunkRows>(x, transposed(item.x), work.col(), row, item.m, work.end());
      else
        stage<T, kChunkRows, WIDTH>(x, item.x, row, work.col(), work.end(), item.m);
      __syncthreads();
      const TransposedTile<T, kBasisPanel> left = {basis};
      const bool split_basis = needs_split(item.basis.dtype), split_x = needs_split(item.x.dtype);
      if constexpr (TRANSPOSED)
        multiply<MT, NT, kDepth>(acc, left, TransposedTile<T, kChunkRows>{x}, 0, n0, part * kDepth, split_basis,
                                 split_x);
      else
        multiply<MT, NT, kDepth>(acc, left, Tile<T, WIDTH>{x}, 0, n0, part * kDepth, split_basis, split_x);
    }
    __syncthreads();
    const Lane lane = fresh_lane();
    T* sums = shared + part * kBasisPanel * WIDTH;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) sums[place<WIDTH>(i * 16 + lane.row(q), n0 + j * 8 + lane.col(q))] = acc[i][j][q];
    __syncthreads();
    const std::int64_t target = work.part(work.chunk) + k0 * WIDTH;
#pragma unroll 1
    for (int e = fresh_thread_index(); e < kBasisPanel * WIDTH; e += kThreads) {
      T sum = 0;
#pragma unroll
      for (int s = 0; s < kSplits; ++s) sum += shared[s * kBasisPanel * WIDTH + place<WIDTH>(e / WIDTH, e % WIDTH)];
      workspace[target + e] = sum;
    }
  }
}

// out[rows] = X[rows] − U[rows] C
template <class T, int WIDTH, bool TRANSPOSED>
SAFELORA_DEVICE void subtract_rows(const T* workspace, const Work<WIDTH>& work, T* shared) {
  constexpr int NT = WIDTH / 8, kTileRows = 16 * kWarps;
  static_assert(kTileRows == kChunkRows);
  T *basis = shared, *coefficients = basis + kChunkRows * kBasisPanel;
  const Strided c = {workspace + work.coefficients(), WIDTH, 1, sizeof(T) == 8 ? DType::f64 : DType::f32, Lines::rows};
#pragma unroll 1
  for (int row = work.begin(); row < work.end(); row += kTileRows) {
    T acc[1][NT][4] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < work.padded_k(); k0 += kBasisPanel) {
      const ProjectOutEntry& item = work.item();
      __syncthreads();
      stage<T, kChunkRows, kBasisPanel>(basis, item.basis, row, k0, work.end(), item.k);
      stage<T, kBasisPanel, WIDTH>(coefficients, c, k0, 0, work.padded_k(), WIDTH);
      __syncthreads();
      multiply<1, NT, kBasisPanel>(acc, Tile<T, kBasisPanel>{basis}, Tile<T, WIDTH>{coefficients}, warp_id() * 16, 0, 0,
                                   needs_split(item.basis.dtype), true);
    }
    __syncthreads();
    const Lane lane = fresh_lane();
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int r = warp_id() * 16 + lane.row(q), n = j * 8 + lane.col(q);
        shared[TRANSPOSED ? place<kTileRows>(n, r) : place<WIDTH>(r, n)] = -acc[0][j][q];
      }
    const ProjectOutEntry& item = work.item();
    __syncthreads();
    if constexpr (TRANSPOSED)
      add_tile<T, WIDTH, kTileRows>(shared, transposed(item.x), transposed(item.out), work.col(), row, item.m,
                                    work.end());
    else
      add_tile<T, kTileRows, WIDTH>(shared, item.x, item.out, row, work.col(), work.end(), item.m);
  }
}

struct Turn {
  int task;
  bool first;
};

// `lag` first tasks, then first and second ones by turns, then the second ones that remain.
SAFELORA_DEVICE Turn turn_of(const ProjectOutParams& p, unsigned ticket) {
  const int order = static_cast<int>(ticket), past = order - p.lag, both = 2 * (p.num_tasks - p.lag);
  if (past < 0) return {order, true};
  if (past >= both) return {past - both / 2, false};
  return past % 2 == 1 ? Turn{p.lag + past / 2, true} : Turn{past / 2, false};
}

// Sums the unit's parts in order.
template <class T, int WIDTH>
SAFELORA_DEVICE void add_parts(T* workspace, const Work<WIDTH>& work) {
  const int size = work.padded_k() * WIDTH, chunks = work.chunks();
  for (int e = fresh_thread_index(); e < size; e += kThreads) {
    const T* part = workspace + work.part(0) + e;
    T sum = 0;
#pragma unroll 4
    for (int c = 0; c < chunks; ++c) sum += part[static_cast<std::int64_t>(c) * size];
    workspace[work.coefficients() + e] = sum;
  }
}

template <class T, int WIDTH, bool TRANSPOSED>
SAFELORA_DEVICE void project_out_block(const ProjectOutParams& p) {
  DYN_SHARED(T, shared);
  unsigned* words = reinterpret_cast<unsigned*>(shared + kProjectOutShared);
  T* workspace = static_cast<T*>(p.workspace);
  if (threadIdx.x == 0) words[0] = add_relaxed(p.counters, 1u);
  __syncthreads();
  const Turn turn = turn_of(p, words[0]);
  const Work<WIDTH> work = work_of<WIDTH>(p, turn.task);
  if (turn.first) {
    multiply_rows<T, WIDTH, TRANSPOSED>(workspace, work, shared);
    if (!arrives_last(work.state(), static_cast<unsigned>(work.chunks()), words + 1)) return;
    add_parts<T, WIDTH>(workspace, work);
    __syncthreads();
    if (threadIdx.x == 0) store_release(work.state() + 1, 1u);
  } else {
    if (threadIdx.x == 0)
      while (load_acquire(work.state() + 1) == 0) spin_pause();
    __syncthreads();
    subtract_rows<T, WIDTH, TRANSPOSED>(workspace, work, shared);
  }
}

}  // namespace

SAFELORA_KERNEL(project_out_narrow_f32, ProjectOutParams, kThreads, 2) {
  project_out_block<float, kNarrow, false>(params);
}
SAFELORA_KERNEL(project_out_narrow_f32_t, ProjectOutParams, kThreads, 2) {
  project_out_block<float, kNarrow, true>(params);
}
SAFELORA_KERNEL(project_out_wide_f32, ProjectOutParams, kThreads, 2) { project_out_block<float, kWide, false>(params); }
SAFELORA_KERNEL(project_out_wide_f32_t, ProjectOutParams, kThreads, 2) {
  project_out_block<float, kWide, true>(params);
}
SAFELORA_KERNEL(project_out_narrow_f64, ProjectOutParams, kThreads, 1) {
  project_out_block<double, kNarrow, false>(params);
}
SAFELORA_KERNEL(project_out_narrow_f64_t, ProjectOutParams, kThreads, 1) {
  project_out_block<double, kNarrow, true>(params);
}
SAFELORA_KERNEL(project_out_wide_f64, ProjectOutParams, kThreads, 1) {
  project_out_block<double, kWide, false>(params);
}
SAFELORA_KERNEL(project_out_wide_f64_t, ProjectOutParams, kThreads, 1) {
  project_out_block<double, kWide, true>(params);
}

}  // namespace safelora::cuda
