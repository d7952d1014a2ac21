#include "isa_kernels.h"

const safelora::detail::IsaTable& safelora::detail::scalar_table() { return this_table(); }
