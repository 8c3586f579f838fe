// CUDA launcher of affine_shift. Addresses of device memory, sizes and strides in elements, dtype code of dtype.h.
// `sums` is room for `parts` times R D floats for the shift of the mean, or 0.
#pragma once

#include <cstdint>

namespace pysteer {

void affine_shift_cuda(std::uintptr_t x, std::uintptr_t y, std::uintptr_t gain, std::uintptr_t bias,
                       std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span,
                       std::uintptr_t low, std::uintptr_t high, std::uintptr_t sums, std::int64_t rows,
                       std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
                       std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token, std::int64_t y_channel,
                       std::int64_t sets, std::int64_t steps, std::int64_t capacity, std::int64_t dtype,
                       std::int64_t parts, std::uintptr_t stream);

}  // namespace pysteer
