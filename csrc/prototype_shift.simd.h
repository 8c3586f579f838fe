// Inner loops of prototype_shift for one instruction set, included by each_isa.h.
//
// Scores are dot products along the channels, kTile tokens by four prototypes at a time in registers; only the index of
// the best prototype leaves them. The block of tokens is still in the cache when its shift is added.

#include "dot_tiles.h"

#if PYSTEER_ISA_LEVEL >= 3
constexpr int kTile = 6;
#elif PYSTEER_ISA_LEVEL == 2
constexpr int kTile = 3;
#else
constexpr int kTile = 1;
#endif

// The index of the best prototype of kTokens tokens; the lowest wins ties.
template <int kTokens>
inline void nearest_tile(const float* x, std::int64_t stride, std::int64_t width, std::int64_t prototypes,
                         const float* weight, const float* offset, std::int32_t* nearest) {
    float best[kTokens];
    for (int t = 0; t < kTokens; ++t) {
        best[t] = -__builtin_inff();
        nearest[t] = 0;
    }
    for (std::int64_t k = 0; k < prototypes; k += 4) {
        const float* w[4];
        for (int i = 0; i < 4; ++i) w[i] = weight + std::min(k + i, prototypes - 1) * width;
        float scores[kTokens * 4];
        dot_tile<kTokens, 4>(x, stride, w, width, scores);
        const int count = int(std::min<std::int64_t>(4, prototypes - k));
        for (int t = 0; t < kTokens; ++t) {
            for (int i = 0; i < count; ++i) {
                const float score = scores[4 * t + i] + offset[k + i];
                if (score > best[t]) {
                    best[t] = score;
                    nearest[t] = std::int32_t(k + i);
                }
            }
        }
    }
}

inline void find_nearest(const float* x, std::int64_t stride, std::int64_t tokens, std::int64_t width,
                         std::int64_t prototypes, const float* weight, const float* offset, std::int32_t* nearest) {
    std::int64_t t = 0;
    for (; t + kTile <= tokens; t += kTile) {
        nearest_tile<kTile>(x + t * stride, stride, width, prototypes, weight, offset, nearest + t);
    }
    for (; t + 2 <= tokens; t += 2) {
        nearest_tile<2>(x + t * stride, stride, width, prototypes, weight, offset, nearest + t);
    }
    for (; t < tokens; ++t) {
        nearest_tile<1>(x + t * stride, stride, width, prototypes, weight, offset, nearest + t);
    }
}

// y = x + s (delta - pull x)
template <class T, bool kStream>
inline void add_shift(const T* x, T* y, std::int64_t width, const float* delta, float strength, bool pull) {
    const Vec s = set1(strength);
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec u0, u1, v0, v1;
        load2_as(T{}, delta + d, u0, u1);
        load2(x + d, v0, v1);
        put2<T, kStream>(y + d, fma(s, pull ? sub(u0, v0) : u0, v0), fma(s, pull ? sub(u1, v1) : u1, v1));
    }
    for (; d < width; ++d) {
        const float v = to_float(x[d]);
        y[d] = from_float<T>(fma1(strength, pull ? delta[d] - v : delta[d], v));
    }
}

// A block of tokens of one row, channels next to each other. scratch: [tokens, width]; nearest: [tokens].
template <class T>
void prototype_tokens(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                      const PrototypeSet& set, bool streaming, float* scratch, std::int32_t* nearest) {
    std::int64_t stride = 0;
    const float* floats = as_floats(x, x_stride, tokens, set.width, scratch, &stride);
    find_nearest(floats, stride, tokens, set.width, set.prototypes, set.weight, set.offset, nearest);
    const bool past_caches = streaming && aligned_for_streams(y, y_stride);
    for (std::int64_t t = 0; t < tokens; ++t) {
        const float* delta = set.delta + nearest[t] * set.width;
        if (past_caches) {
            add_shift<T, true>(x + t * x_stride, y + t * y_stride, set.width, delta, set.strength, set.pull);
        } else {
            add_shift<T, false>(x + t * x_stride, y + t * y_stride, set.width, delta, set.strength, set.pull);
        }
    }
}

// A block of tokens of one row, tokens next to each other: turned over into scratch, changed there and turned back.
template <class T>
void prototype_channels(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                        const PrototypeSet& set, float* scratch, std::int32_t* nearest) {
    for (std::int64_t d = 0; d < set.width; ++d) {
        for (std::int64_t t = 0; t < tokens; ++t) scratch[t * set.width + d] = to_float(x[d * x_stride + t]);
    }
    find_nearest(scratch, set.width, tokens, set.width, set.prototypes, set.weight, set.offset, nearest);
    for (std::int64_t t = 0; t < tokens; ++t) {
        float* token = scratch + t * set.width;
        add_shift<float, false>(token, token, set.width, set.delta + nearest[t] * set.width, set.strength, set.pull);
    }
    for (std::int64_t d = 0; d < set.width; ++d) {
        for (std::int64_t t = 0; t < tokens; ++t) y[d * y_stride + t] = from_float<T>(scratch[t * set.width + d]);
    }
}
