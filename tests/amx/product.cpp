// One product of tiles, C += A·B, by the intrinsics: emulated where tiles.h is included first, by the CPU otherwise.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" {

// 0 if this thread may use tiles.
long permission() {
#ifdef SAFELORA_AMX_EMULATED
  return 0;
#else
  return syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#endif
}

void product(const void* config, const void* a, long a_stride, const void* b, long b_stride, void* c, long c_stride) {
  _tile_loadconfig(config);
  _tile_loadd(0, c, c_stride);
  _tile_loadd(1, a, a_stride);
  _tile_loadd(2, b, b_stride);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, c_stride);
  _tile_release();
}
}
