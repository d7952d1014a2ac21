#include <algorithm>
#include <cmath>
#include <vector>

#include "safelora/kernels.h"

namespace safelora {
namespace {

double compared(double cosine, SelectRule rule) {
  return rule == SelectRule::authors ? std::nearbyint(cosine * 1e5) / 1e5 : cosine;
}

}  // namespace

void select_by_threshold(const double* cosines, std::int64_t n, double threshold, SelectRule rule, bool* selected) {
  for (std::int64_t i = 0; i < n; ++i) selected[i] = compared(cosines[i], rule) <= threshold;
}

void select_lowest(const double* cosines, std::int64_t n, std::int64_t num_layers, SelectRule rule, bool* selected) {
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < n; ++i)
    if (!std::isnan(cosines[i])) order.push_back(i);
  std::fill(selected, selected + n, false);
  const std::size_t count = std::min<std::size_t>(order.size(), static_cast<std::size_t>(num_layers));
  if (count == 0) return;
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return compared(cosines[a], rule) < compared(cosines[b], rule);
  });
  if (rule == SelectRule::authors)  // ties with the K-th smallest are selected too
    select_by_threshold(cosines, n, compared(cosines[order[count - 1]], rule), rule, selected);
  else
    for (std::size_t i = 0; i < count; ++i) selected[order[i]] = true;
}

}  // namespace safelora
