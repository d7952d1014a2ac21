#include "isa_kernels.h"

const safelora::detail::IsaTable& safelora::detail::avx512_table() { return this_table(); }
