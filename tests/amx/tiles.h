// Intel AMX without the hardware: put before a file that uses its intrinsics (-include), this sends them to tiles.cpp.
#pragma once

#define SAFELORA_AMX_EMULATED 1  // csrc/cpu/cpu_features.cpp

extern "C" {
void emulated_loadconfig(const void* config);
void emulated_release();
void emulated_zero(int tile);
void emulated_loadd(int tile, const void* base, long stride);
void emulated_stored(int tile, void* base, long stride);
void emulated_dpbf16ps(int sum, int a, int b);

// The first misuse since the last call, in words; null where there was none.
const char* emulated_fault();
// Tile products since the last call, of all threads.
long emulated_products();
}

#ifdef __AMX_TILE__
#include <immintrin.h>  // where they are macros or functions

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
#endif
