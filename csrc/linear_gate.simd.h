// Inner loops of linear_gate for one instruction set, included by each_isa.h.

namespace {  // other kernel files have sums and dot products of their own in this namespace

#include "row_sums.simd.h"

inline float dot(const float* a, const float* b, std::int64_t width) {
    Vec sum = zero();
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
    float total = lanes_of(sum);
    for (; d < width; ++d) total = fma1(a[d], b[d], total);
    return total;
}

// The gate of a row with the mean v; spare: [width].
inline float gate_of(const float* v, const GateCall& g, float* spare) {
    const std::int64_t width = g.width;
    if (g.kind == kMinMax) {
        bool inside = true;
        for (std::int64_t d = 0; d < width; ++d) inside &= v[d] >= g.weight[d] && v[d] <= g.weight[width + d];
        return inside ? 1.0f : 0.0f;
    }
    if (g.kind == kOod) {
        for (std::int64_t d = 0; d < width; ++d) spare[d] = v[d] - g.weight[d];
        float square = dot(spare, spare, width);
        for (std::int64_t j = 0; j < g.rank; ++j) {
            const float along = dot(spare, g.factor + j * width, width);
            square -= along * along;
        }
        return (g.scale ? square * *g.scale : square) <= *g.bias ? 1.0f : 0.0f;
    }
    const float first = dot(v, g.weight, width) + g.bias[0];
    float rest = g.count == 1 ? std::exp(-first) : 0.0f;  // of the others, in units of the first
    for (std::int64_t c = 1; c < g.count; ++c)
        rest += std::exp(dot(v, g.weight + c * width, width) + g.bias[c] - first);
    const float probability = 1.0f / (1.0f + rest);
    return g.threshold < 0.0f ? probability : probability >= g.threshold ? 1.0f : 0.0f;
}

}  // namespace
