// Inner loops of by_mean.cpp for one instruction set, included by each_isa.h.

namespace {  // names repeat between kernel files

#include "affine_shift.simd.h"
#include "dot_tiles.h"
#include "row_sums.simd.h"

// out[i] = weight_i · v + bias[i], weight [count, width].
void dense(const float* weight, const float* bias, const float* v, std::int64_t count, std::int64_t width, float* out) {
    std::int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float* rows[4];
        for (int k = 0; k < 4; ++k) rows[k] = weight + (i + k) * width;
        dot_tile<1, 4>(v, 0, rows, width, out + i);
    }
    for (; i < count; ++i) {
        const float* row = weight + i * width;
        dot_tile<1, 1>(v, 0, &row, width, out + i);
    }
    for (i = 0; i < count && bias; ++i) out[i] += bias[i];
}

// sums += factor v.
void add_scaled(float factor, const float* v, std::int64_t width, float* sums) {
    const Vec f = set1(factor);
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(sums + d, fma(f, load(v + d), load(sums + d)));
    for (; d < width; ++d) sums[d] = fma1(factor, v[d], sums[d]);
}

}  // namespace
