#include "panels.h"
#include "parallel.h"

namespace safelora {

void update_cosine(const std::vector<CosineItem>& items, double* cosines, const Threads& threads) {
  using namespace detail;
  parallel_for(threads, static_cast<std::int64_t>(items.size()), [&](std::int64_t i) {
    const CosineItem& item = items[i];
    cosines[i] =
        cosine(item.lora_B.rows, item.lora_A, [&](std::int64_t first, std::int64_t count, double* b_new, double* b) {
          load_panels(rows_of(item.lora_B_new, first, count), b_new, count);
          load_panels(rows_of(item.lora_B, first, count), b, count);
        });
  });
}

}  // namespace safelora
