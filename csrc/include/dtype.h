// Codes of the element types, the same in Python (pysteer._C.DTYPES) and in every kernel.
#pragma once

#include <cstdint>

namespace pysteer {

enum class DType : std::int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

inline std::int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace pysteer
