// The element types that kernels are compiled for, as indices into their tables.
#pragma once

namespace fourfold {

enum Element { kHalf, kBFloat16, kFloat, kDouble, kElements };

}  // namespace fourfold
