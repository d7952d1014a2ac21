// What the two emulated drivers share: the settings, the memory that kernels may touch, and a door for Python.
#pragma once

#include <cstddef>

#include "launch.h"
#include "simt/machine.h"

namespace emulated {

// A launch, as the door takes it and as the PTX driver hands it to Python: keep in step with emulated.py.
struct Launch {
  const char* kernel;
  unsigned grid[3], block, cluster;
  std::size_t shared;
  const void* params;
  std::size_t bytes;
};

// Memory of a tensor, for drivers that check addresses themselves.
void remember(const void* data, std::size_t bytes);

// Device memory full of NaN, of exactly this size, until `forget_all`.
void* allocate(std::size_t bytes);
void forget_all();

// Calls visit for every piece of memory known.
void for_each_piece(void (*visit)(const void* data, std::size_t bytes, void* context), void* context);

safelora::cuda::Stream stream();

}  // namespace emulated
