#include "panels.h"
#include "parallel.h"

namespace safelora {

void update_cosine(const std::vector<CosineItem>& items, double* cosines, const Threads& threads) {
  using namespace detail;
  const auto run = [&](const CosineItem& item, auto zero) {
    using T = decltype(zero);
    return cosine(panels_of<T>(item.lora_B_new).get(), panels_of<T>(item.lora_B).get(), item.lora_B.rows, item.lora_A);
  };
  parallel_for(threads, static_cast<std::int64_t>(items.size()), [&](std::int64_t i) {
    const CosineItem& item = items[i];
    const bool wide = has_f64(item.lora_B_new) || has_f64(item.lora_B) || has_f64(item.lora_A);
    cosines[i] = wide ? run(item, double{}) : run(item, float{});
  });
}

}  // namespace safelora
