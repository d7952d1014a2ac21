// Which path this CPU can take, and which one the user asks for.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

#if defined(SAFELORA_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace safelora {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

#ifdef SAFELORA_X86
// AMX-TILE and AMX-BF16, and the system's leave to use them.
bool amx_usable() {
#if defined(SAFELORA_AMX_EMULATED)  // tests/amx
  return true;
#elif defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (edx >> 22 & 1) && (edx >> 24 & 1) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa choose() {
  const char* asked = std::getenv("SAFELORA_CPU_ISA");
  if (asked == nullptr || *asked == '\0') {
    Isa best = Isa::scalar;
    for (Isa isa : kAll)
      if (isa_supported(isa)) best = isa;
    return best;
  }
  for (Isa isa : kAll)
    if (asked == std::string(isa_name(isa))) {
      if (isa_supported(isa)) return isa;
      throw std::runtime_error("SAFELORA_CPU_ISA=" + std::string(asked) +
                               ": this CPU cannot run it; unset the variable to take the best path it has");
    }
  throw std::runtime_error("SAFELORA_CPU_ISA=" + std::string(asked) +
                           ": unknown; expected one of amx, avx512_bf16, avx512, avx2, scalar");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
    case Isa::scalar: break;
  }
  return "scalar";
}

bool isa_supported(Isa isa) {
#ifdef SAFELORA_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    case Isa::amx: {
      static const bool usable = avx512 && amx_usable();
      return usable;
    }
    case Isa::scalar: break;
  }
  return true;
#else
  return isa == Isa::scalar;
#endif
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

namespace detail {

static const IsaTable& table() {
#ifdef SAFELORA_X86
  switch (active_isa()) {
    case Isa::amx:
    case Isa::avx512_bf16:
    case Isa::avx512: return avx512_table();
    case Isa::avx2: return avx2_table();
    case Isa::scalar: break;
  }
#endif
  active_isa();  // an unknown name in the environment is an error on every CPU
  return scalar_table();
}

template <>
const Kernels<float>& kernels<float>() {
  return table().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return table().f64;
}

const ThinKernels* thin_kernels() {
#ifdef SAFELORA_X86
  if (active_isa() >= Isa::avx512_bf16 && isa_supported(Isa::avx512_bf16)) return &avx512_bf16_thin();
  if (active_isa() >= Isa::avx512) return &avx512_thin();
#endif
  return nullptr;
}

}  // namespace detail
}  // namespace safelora
