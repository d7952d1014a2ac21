#include "panels.h"
#include "parallel.h"

namespace safelora {

void update_cosine(const std::vector<CosineItem>& items, double* cosines, const Threads& threads) {
  using namespace detail;
  parallel_for(threads, static_cast<std::int64_t>(items.size()), [&](std::int64_t i) {
    const CosineItem& item = items[i];
    cosines[i] = cosine(panels_of<double>(item.lora_B_new).get(), panels_of<double>(item.lora_B).get(),
                        item.lora_B.rows, item.lora_A);
  });
}

}  // namespace safelora
