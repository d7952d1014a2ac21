#include "isa_kernels.h"

const safelora::detail::IsaTable& safelora::detail::avx2_table() { return this_table(); }
