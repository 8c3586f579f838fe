// Inner loops of gradient_shift for one instruction set, included by each_isa.h.

#include "dot_tiles.h"

namespace {  // other kernel files have tiles of their own in this namespace

#if PYSTEER_ISA_LEVEL >= 3
constexpr int kTile = 6;
#elif PYSTEER_ISA_LEVEL == 2
constexpr int kTile = 3;
#else
constexpr int kTile = 1;
#endif

// products[t * n + k] of kTokens tokens with the K weights and, behind them, the r directions; n = K + r.
template <int kTokens>
inline void products_tile(const float* x, std::int64_t stride, const GradientSet& set, float* products) {
    const std::int64_t n = set.prototypes + set.rank;
    for (std::int64_t k = 0; k < n; k += 4) {
        const float* w[4];
        for (int i = 0; i < 4; ++i) {
            const std::int64_t at = std::min(k + i, n - 1);
            w[i] = at < set.prototypes ? set.weight + at * set.width : set.factor + (at - set.prototypes) * set.width;
        }
        float four[kTokens * 4];
        dot_tile<kTokens, 4>(x, stride, w, set.width, four);
        const int count = int(std::min<std::int64_t>(4, n - k));
        for (int t = 0; t < kTokens; ++t) std::copy(four + 4 * t, four + 4 * t + count, products + t * n + k);
    }
}

inline void products_of(const float* x, std::int64_t stride, std::int64_t tokens, const GradientSet& set,
                        float* products) {
    const std::int64_t n = set.prototypes + set.rank;
    std::int64_t t = 0;
    for (; t + kTile <= tokens; t += kTile) products_tile<kTile>(x + t * stride, stride, set, products + t * n);
    for (; t < tokens; ++t) products_tile<1>(x + t * stride, stride, set, products + t * n);
}

// own[k * rank + i]: the product of prototype k with direction i.
inline void own_products(const GradientSet& set, float* own) {
    for (std::int64_t k = 0; k < set.prototypes; ++k) {
        for (std::int64_t i = 0; i < set.rank; ++i) {
            const float* w[1] = {set.factor + i * set.width};
            dot_tile<1, 1>(set.centre + k * set.width, 0, w, set.width, own + k * set.rank + i);
        }
    }
}

// Scores in place of the products with the weights; returns the best target prototype, and the part w of the shift.
inline std::int64_t choose_target(const GradientSet& set, float* scores, float* part) {
    std::int64_t target = 0, best = 0;
    bool found = false;
    for (std::int64_t k = 0; k < set.prototypes; ++k) {
        scores[k] += set.offset[k];
        if (scores[k] > scores[best]) best = k;
        if (set.target[k] != 0.0f && (!found || scores[k] > scores[target])) {
            target = k;
            found = true;
        }
    }
    *part = set.gate ? 1.0f - set.target[best] : 1.0f;
    if (set.gate && set.temperature > 0.0f) {
        float all = 0.0f, others = 0.0f;
        for (std::int64_t k = 0; k < set.prototypes; ++k) {
            const float mass = std::exp((scores[k] - scores[best]) / set.temperature);
            all += mass;
            others += mass * (1.0f - set.target[k]);
        }
        *part = others / all;
    }
    return target;
}

inline float length_of(const float* v, std::int64_t width) {
    Vec sum = zero();
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) sum = fma(load(v + d), load(v + d), sum);
    float four[4];
    sum4(sum, zero(), zero(), zero(), four);
    for (; d < width; ++d) four[0] = fma1(v[d], v[d], four[0]);
    return std::sqrt(four[0]);
}

// y = x + s u of one token; x: fp32, products: of this token, u: [width] to work in. y may be x.
template <class T>
inline void shift_token(const float* x, T* y, const GradientSet& set, float* products, float* u) {
    float part = 1.0f;
    const std::int64_t j = choose_target(set, products, &part), width = set.width;
    const float *along = products + set.prototypes, *own = set.own + j * set.rank, *centre = set.centre + j * width;
    for (std::int64_t d = 0; d < width; ++d) u[d] = centre[d] - x[d];
    for (std::int64_t i = 0; i < set.rank; ++i) {
        const float* direction = set.factor + i * width;
        const float by = along[i] - own[i];
        for (std::int64_t d = 0; d < width; ++d) u[d] = fma1(by, direction[d], u[d]);
    }
    float factor = set.scale * part;
    if (set.normalize != kNone) {
        const float length = factor * length_of(u, width);
        factor /= std::max(length, std::numeric_limits<float>::min());
        if (set.normalize == kInput) factor *= length_of(x, width);
    }
    factor *= set.strength;
    for (std::int64_t d = 0; d < width; ++d) y[d] = from_float<T>(fma1(factor, u[d], x[d]));
}

// A block of tokens of one row, channels next to each other. scratch: [tokens, width], products: [tokens, K + r].
template <class T>
void gradient_tokens(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                     const GradientSet& set, float* scratch, float* products, float* u) {
    std::int64_t stride = 0;
    const float* floats = as_floats(x, x_stride, tokens, set.width, scratch, &stride);
    products_of(floats, stride, tokens, set, products);
    for (std::int64_t t = 0; t < tokens; ++t) {
        shift_token(floats + t * stride, y + t * y_stride, set, products + t * (set.prototypes + set.rank), u);
    }
}

// A block of tokens of one row, tokens next to each other: turned over into scratch, changed there and turned back.
template <class T>
void gradient_channels(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                       const GradientSet& set, float* scratch, float* products, float* u) {
    for (std::int64_t d = 0; d < set.width; ++d) {
        for (std::int64_t t = 0; t < tokens; ++t) scratch[t * set.width + d] = to_float(x[d * x_stride + t]);
    }
    gradient_tokens(scratch, scratch, tokens, set.width, set.width, set, scratch, products, u);
    for (std::int64_t d = 0; d < set.width; ++d) {
        for (std::int64_t t = 0; t < tokens; ++t) y[d * y_stride + t] = from_float<T>(scratch[t * set.width + d]);
    }
}

}  // namespace
