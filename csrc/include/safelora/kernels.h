// C++ API of the CPU kernels. Framework-free: raw pointers, sizes, strides, and the caller's threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#if defined(__GNUC__)
#define SAFELORA_API __attribute__((visibility("default")))
#else
#define SAFELORA_API
#endif

namespace safelora {

enum class DType : std::uint8_t { f32, bf16, f16, f64 };

// A dense 2-D view; strides count elements.
struct ConstMatrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0, cols = 0;
  std::int64_t row_stride = 0, col_stride = 1;
};

struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0, cols = 0;
  std::int64_t row_stride = 0, col_stride = 1;

  operator ConstMatrix() const { return {data, dtype, rows, cols, row_stride, col_stride}; }
};

// The caller's threads. `run(n, task)` calls task(0) … task(n-1), each at most once, possibly at the same time, and
// returns when all are done. Kernels call it with n <= count; the results do not depend on count.
struct Threads {
  int count = 1;
  std::function<void(int, const std::function<void(int)>&)> run;
};

// `count` std::threads started per call; 0 takes the number of hardware threads. For callers without a pool.
SAFELORA_API Threads std_threads(int count = 0);

enum class Isa : std::uint8_t { scalar, avx2, avx512, avx512_bf16, amx };

// The path kernels take on this CPU, or the one SAFELORA_CPU_ISA asks for.
// Throws std::runtime_error if that name is unknown or the CPU lacks it.
SAFELORA_API Isa active_isa();
SAFELORA_API const char* isa_name(Isa isa);
SAFELORA_API bool isa_supported(Isa isa);

// SAFELORA_DEBUG=1: scratch memory starts as NaN, so that an entry read before it is written shows in the result.
SAFELORA_API bool debug();

// One adapter over one weight pair. lora_B, projected: (d_out, rank); lora_A: (rank, d_in), rows == 0 if absent.
struct ProjectFactor {
  ConstMatrix lora_B, lora_A;
  Matrix projected;
  double* cosine = nullptr;  // cos(B'A, BA); NaN if lora_A is absent or V = 0; 0 for a zero update
};

// One weight pair, (d_out, d_in) each, and the adapters over it.
struct ProjectLayer {
  ConstMatrix aligned, base;
  std::vector<ProjectFactor> factors;
  double* v_norm = nullptr;  // ‖V‖_F
};

enum class Normalize : std::uint8_t { frobenius, none };

// Safe LoRA (arXiv 2405.16833): B' = V(VᵀB)/‖V‖_F with V = aligned − base, for all layers. Several
// adapters over one pair share its reads: one per weight, two on AVX-512 and AMX.
SAFELORA_API void project_layers(const std::vector<ProjectLayer>& layers, Normalize normalize, const Threads& threads);

// cosines[i] = ⟨B'A, BA⟩ / (‖B'A‖·‖BA‖) from rank×rank Gram matrices; 0 for a zero update.
struct CosineItem {
  ConstMatrix lora_B_new, lora_B, lora_A;
};
SAFELORA_API void update_cosine(const std::vector<CosineItem>& items, double* cosines, const Threads& threads);

enum class SelectRule : std::uint8_t { strict, authors };

// selected[i]: cosine i falls under the threshold, or is among the num_layers smallest. NaN is never selected.
SAFELORA_API void select_by_threshold(const double* cosines, std::int64_t n, double threshold, SelectRule rule,
                                      bool* selected);
SAFELORA_API void select_lowest(const double* cosines, std::int64_t n, std::int64_t num_layers, SelectRule rule,
                                bool* selected);

enum class Side : std::uint8_t { left, right };

// out = X − U(UᵀX) (left; U: rows×k) or X − (XU)Uᵀ (right; U: cols×k). out may be x itself.
struct ProjectOutItem {
  ConstMatrix x, basis;
  Matrix out;
};
SAFELORA_API void project_out(const std::vector<ProjectOutItem>& items, Side side, const Threads& threads);

// out = Xᵀ diag(w) X Z with x (tokens×d), z (d×r) and weights (tokens×1; data == nullptr: ones), one pass over X.
// Computed in fp64 if anything of the item is fp64, else in fp32.
struct GramItem {
  ConstMatrix x, z, weights;
  Matrix out;
};
SAFELORA_API void gram_apply(const std::vector<GramItem>& items, const Threads& threads);

// SaLoRA (arXiv 2501.01765): y = base_output + scaling·h·B̃ᵀ, h = x·Aᵀ (tokens×rank), B̃ = B − U(UᵀB) (d_out×rank).
struct SaloraForward {
  ConstMatrix x, base_output, lora_A, lora_B, basis;
  double scaling = 1.0;
  Matrix y, h, projected_B;
};
SAFELORA_API void salora_forward(const SaloraForward& args, const Threads& threads);

// Gradients of y with respect to x, lora_A, lora_B and the basis; data == nullptr skips one. grad_y is read once.
struct SaloraBackward {
  ConstMatrix grad_y, x, h, lora_A, lora_B, projected_B, basis;
  double scaling = 1.0;
  Matrix grad_x, grad_A, grad_B, grad_basis;
};
SAFELORA_API void salora_backward(const SaloraBackward& args, const Threads& threads);

}  // namespace safelora
