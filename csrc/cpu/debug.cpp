// Apart from all kernels, because the CUDA library wants it without them.
#include <cstdlib>
#include <string>

#include "safelora/kernels.h"

namespace safelora {

bool debug() {
  static const bool on = [] {
    const char* value = std::getenv("SAFELORA_DEBUG");
    return value != nullptr && std::string(value) == "1";
  }();
  return on;
}

}  // namespace safelora
