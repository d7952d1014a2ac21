// Gram matrices of low-rank factors in fp64, and the cosines they give. See gram_cosine.cuh.
#include "gram_cosine.cuh"
#include "tile.cuh"

namespace safelora::cuda {
namespace {

constexpr int kPairs = kGramTile / 2;                  // a thread owns 2×2 entries of each Gram
constexpr int kSplits = kThreads / (kPairs * kPairs);  // threads that own the same entries, for other contraction steps
constexpr int kPanel = kGramDepth * kGramTile;

struct Pair {
  double at[2];
};

// acc += left[k, 2i : 2i+2]ᵀ right[k, 2j : 2j+2]
SAFELORA_DEVICE void outer(double (&acc)[2][2], const Pair& left, const Pair& right) {
#pragma unroll
  for (int a = 0; a < 2; ++a)
#pragma unroll
    for (int b = 0; b < 2; ++b) acc[a][b] += left.at[a] * right.at[b];
}

template <class View>
SAFELORA_DEVICE Pair pair_of(const View& tile, int k, int i) {
  return {{tile(k, 2 * i), tile(k, 2 * i + 1)}};
}

// Sum over the block, in the same order every time.
SAFELORA_DEVICE double block_sum(double value, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

SAFELORA_DEVICE double cosine_of(double cross, double old_square, double new_square) {
  const double norms = sqrt(old_square < 0 ? 0.0 : old_square) * sqrt(new_square < 0 ? 0.0 : new_square);
  if (norms == 0) return 0.0;
  const double cosine = cross / norms;
  return cosine < -1 ? -1.0 : cosine > 1 ? 1.0 : cosine;
}

SAFELORA_DEVICE void gram_cosine_block(const GramCosineParams& p) {
  DYN_SHARED(double, shared);
  unsigned* word = reinterpret_cast<unsigned*>(shared + kGramShared);
  const int block = static_cast<int>(blockIdx.x), number = item_of(p.items, p.num_items, block);
  const CosineEntry& item = p.items[number];
  const int tiles = item.rank > 0 ? (item.rank + kGramTile - 1) / kGramTile : 1;
  const int tile = (block - item.first_block) / item.chunks, chunk = (block - item.first_block) % item.chunks;
  const int ri = tile / tiles * kGramTile, rj = tile % tiles * kGramTile;
  const int i = static_cast<int>(threadIdx.x) / kPairs % kPairs, j = static_cast<int>(threadIdx.x) % kPairs;
  const int group = static_cast<int>(threadIdx.x) / (kPairs * kPairs);
  double grams[4][2][2] = {};  // BᵀB', BᵀB, B'ᵀB', AAᵀ

  const auto chunk_end = [&](int extent, int c) {
    const int steps = (extent + kGramDepth - 1) / kGramDepth;
    const std::int64_t end = static_cast<std::int64_t>(steps) * c / item.chunks * kGramDepth;
    return static_cast<int>(end < extent ? end : extent);
  };
  const bool diagonal = ri == rj;
  {
    const double *new_i = shared, *old_i = shared + kPanel;
    const double *new_j = diagonal ? new_i : shared + 2 * kPanel, *old_j = diagonal ? old_i : shared + 3 * kPanel;
    const int last = chunk_end(item.d_out, chunk + 1);
    for (int k = chunk_end(item.d_out, chunk); k < last; k += kGramDepth) {
      __syncthreads();
#pragma unroll 1
      for (int n = 0; n < (diagonal ? 2 : 4); ++n)
        stage<double, kGramDepth, kGramTile>(shared + n * kPanel, n % 2 ? item.lora_B : item.lora_B_new, k,
                                             n < 2 ? ri : rj, item.d_out, item.rank);
      __syncthreads();
      using View = Tile<double, kGramTile>;
#pragma unroll 1
      for (int step = group; step < kGramDepth; step += kSplits) {
        const Pair b_i = pair_of(View{old_i}, step, i), b_j = pair_of(View{old_j}, step, j);
        const Pair new_b_i = pair_of(View{new_i}, step, i), new_b_j = pair_of(View{new_j}, step, j);
        outer(grams[0], b_i, new_b_j);
        outer(grams[1], b_i, b_j);
        outer(grams[2], new_b_i, new_b_j);
      }
    }
  }
  {
    const double *a_i = shared, *a_j = diagonal ? a_i : shared + kPanel;
    const int last = item.absent ? 0 : chunk_end(item.d_in, chunk + 1);
    for (int k = chunk_end(item.d_in, chunk); k < last; k += kGramDepth) {
      __syncthreads();
#pragma unroll 1
      for (int n = 0; n < (diagonal ? 1 : 2); ++n)
        stage<double, kGramTile, kGramDepth>(shared + n * kPanel, item.lora_A, n ? rj : ri, k, item.rank, item.d_in);
      __syncthreads();
      using View = TransposedTile<double, kGramDepth>;
#pragma unroll 1
      for (int step = group; step < kGramDepth; step += kSplits)
        outer(grams[3], pair_of(View{a_i}, step, i), pair_of(View{a_j}, step, j));
    }
  }

  double* partial = p.partials + static_cast<std::int64_t>(block) * 4 * kThreads;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    __syncthreads();
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int b = 0; b < 2; ++b) shared[group * kThreads + (2 * i + a) * kGramTile + 2 * j + b] = grams[g][a][b];
    __syncthreads();
    double sum = 0;
    for (int other = 0; other < kSplits; ++other) sum += shared[other * kThreads + threadIdx.x];
    partial[g * kThreads + threadIdx.x] = sum;
  }

  // The last block of a tile adds its chunks in order, and the last tile of an item its tiles.
  const int first = item.first_block + tile * item.chunks;
  if (!arrives_last(p.counters + first, static_cast<unsigned>(item.chunks), word)) return;
  double sums[4] = {};
  double* partials = p.partials + static_cast<std::int64_t>(first) * 4 * kThreads;
  for (int c = 0; c < item.chunks; ++c)
#pragma unroll
    for (int g = 0; g < 4; ++g) sums[g] += partials[(c * 4 + g) * kThreads + threadIdx.x];
#pragma unroll
  for (int g = 0; g < 3; ++g) {
    const double inner = block_sum(sums[g] * sums[3], shared);
    if (threadIdx.x == 0) partials[g] = inner;
  }
  if (!arrives_last(p.counters + p.num_blocks + number, static_cast<unsigned>(tiles * tiles), word)) return;
  double inner[3];
#pragma unroll
  for (int g = 0; g < 3; ++g) {
    double sum = 0;
    for (int t = static_cast<int>(threadIdx.x); t < tiles * tiles; t += kThreads)
      sum += p.partials[static_cast<std::int64_t>(item.first_block + t * item.chunks) * 4 * kThreads + g];
    inner[g] = block_sum(sum, shared);
  }
  if (threadIdx.x != 0) return;
  const bool undefined = item.absent || (item.v_norm != nullptr && *item.v_norm == 0);
  *item.cosine = undefined ? nan("") : cosine_of(inner[0], inner[1], inner[2]);
}

}  // namespace

SAFELORA_KERNEL(gram_cosine, GramCosineParams, kThreads, 2) { gram_cosine_block(params); }

}  // namespace safelora::cuda
