// Inner loops of prototype_shift for one instruction set, included by each_isa.h.
//
// Few prototypes, or few tokens: scores are dot products along the channels, kTile tokens by four prototypes at a time
// in registers. Many of both: the prototypes are turned over once into panels, [width][vectors of prototypes], and a
// tile of tokens meets a whole panel in registers without sums over lanes. Only the index of the best prototype leaves
// either. The block of tokens is still in the cache when its shift is added.

#include "dot_tiles.h"

namespace {  // other kernel files have panels and tiles of their own in this namespace

#if PYSTEER_ISA_LEVEL >= 3
constexpr int kTile = 6;
constexpr int kSums = 24;       // that are kept in registers
constexpr int kPanelWidth = 4;  // vectors of a panel; the last may have fewer
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
#elif PYSTEER_ISA_LEVEL == 2
constexpr int kTile = 3;
constexpr int kSums = 12;
constexpr int kPanelWidth = 2;
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
#else
constexpr int kTile = 1;
constexpr int kSums = 8;
constexpr int kPanelWidth = 4;
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif
constexpr int kPanel = kPanelWidth * kLanes;

inline std::int64_t panel_size() { return kPanel; }

// Floats of the panels of one set.
inline std::int64_t panels_size(std::int64_t prototypes, std::int64_t width) {
    return (prototypes + kLanes - 1) / kLanes * kLanes * width;
}

// Panel number `index` of the weights [prototypes, width]; what there is no prototype for is zero.
inline void pack_panel(const float* weight, std::int64_t prototypes, std::int64_t width, std::int64_t index,
                       float* panels) {
    const std::int64_t first = index * kPanel, count = std::min<std::int64_t>(kPanel, prototypes - first);
    const std::int64_t lanes = (count + kLanes - 1) / kLanes * kLanes;
    constexpr std::int64_t kStep = 16;  // channels at a time, so that the panel is written in the cache
    float* panel = panels + first * width;
    for (std::int64_t start = 0; start < width; start += kStep) {
        const std::int64_t end = std::min(start + kStep, width);
        for (std::int64_t j = 0; j < lanes; ++j) {
            const float* from = weight + (first + std::min(j, count - 1)) * width;
            for (std::int64_t d = start; d < end; ++d) panel[d * lanes + j] = j < count ? from[d] : 0.0f;
        }
    }
}

// The prototypes of one panel, kVectors vectors of them, against kTokens tokens.
template <int kVectors, int kTokens>
inline void panel_tile(const float* x, std::int64_t stride, std::int64_t width, const float* panel, const float* offset,
                       std::int64_t first, std::int64_t count, float* best, std::int32_t* nearest) {
    Vec sum[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVectors; ++v) sum[t][v] = zero();
    }
    for (std::int64_t d = 0; d < width; ++d) {
        Vec w[kVectors];
        for (int v = 0; v < kVectors; ++v) w[v] = load(panel + (d * kVectors + v) * kLanes);
        for (int t = 0; t < kTokens; ++t) {
            const Vec value = set1(x[t * stride + d]);
            for (int v = 0; v < kVectors; ++v) sum[t][v] = fma(value, w[v], sum[t][v]);
        }
    }
    float offsets[kVectors * kLanes], scores[kVectors * kLanes], top[kLanes];
    for (int i = 0; i < kVectors * kLanes; ++i) offsets[i] = i < count ? offset[first + i] : -__builtin_inff();
    for (int t = 0; t < kTokens; ++t) {
        Vec highest = set1(best[t]);
        for (int v = 0; v < kVectors; ++v) {
            const Vec score = add(sum[t][v], load(offsets + v * kLanes));
            store(scores + v * kLanes, score);
            highest = larger(score, highest);
        }
        store(top, highest);
        float winner = top[0];
        for (int i = 1; i < kLanes; ++i) winner = top[i] > winner ? top[i] : winner;
        if (!(winner > best[t])) continue;
        best[t] = winner;
        int place = 0;
        while (scores[place] != winner) ++place;
        nearest[t] = std::int32_t(first + place);
    }
}

template <int kVectors>
inline void panel_nearest(const float* x, std::int64_t stride, std::int64_t tokens, std::int64_t width,
                          const float* panel, const float* offset, std::int64_t first, std::int64_t count, float* best,
                          std::int32_t* nearest) {
    constexpr int kTokens = std::min(kSums / kVectors, 12);
    std::int64_t t = 0;
    for (; t + kTokens <= tokens; t += kTokens) {
        panel_tile<kVectors, kTokens>(x + t * stride, stride, width, panel, offset, first, count, best + t,
                                      nearest + t);
    }
    for (; t + 2 <= tokens; t += 2) {
        panel_tile<kVectors, 2>(x + t * stride, stride, width, panel, offset, first, count, best + t, nearest + t);
    }
    for (; t < tokens; ++t) {
        panel_tile<kVectors, 1>(x + t * stride, stride, width, panel, offset, first, count, best + t, nearest + t);
    }
}

// As find_nearest, from the panels; at most kBlock tokens.
inline void find_in_panels(const float* x, std::int64_t stride, std::int64_t tokens, std::int64_t width,
                           std::int64_t prototypes, const float* panels, const float* offset, std::int32_t* nearest) {
    float best[kBlock];
    for (std::int64_t t = 0; t < tokens; ++t) {
        best[t] = -__builtin_inff();
        nearest[t] = 0;
    }
    for (std::int64_t first = 0; first < prototypes; first += kPanel) {
        const std::int64_t count = std::min<std::int64_t>(kPanel, prototypes - first);
        const std::int64_t vectors = (count + kLanes - 1) / kLanes;
        const auto find = vectors == 1   ? panel_nearest<1>
                          : vectors == 2 ? panel_nearest<2>
                          : vectors == 3 ? panel_nearest<std::min(3, kPanelWidth)>
                                         : panel_nearest<kPanelWidth>;
        find(x, stride, tokens, width, panels + first * width, offset, first, count, best, nearest);
    }
}

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
                         const PrototypeSet& set, std::int32_t* nearest) {
    const float *weight = set.weight, *offset = set.offset;
    const std::int64_t prototypes = set.prototypes;
    if (set.panels) return find_in_panels(x, stride, tokens, width, prototypes, set.panels, offset, nearest);
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
    find_nearest(floats, stride, tokens, set.width, set, nearest);
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
    find_nearest(scratch, set.width, tokens, set.width, set, nearest);
    for (std::int64_t t = 0; t < tokens; ++t) {
        float* token = scratch + t * set.width;
        add_shift<float, false>(token, token, set.width, set.delta + nearest[t] * set.width, set.strength, set.pull);
    }
    for (std::int64_t d = 0; d < set.width; ++d) {
        for (std::int64_t t = 0; t < tokens; ++t) y[d * y_stride + t] = from_float<T>(scratch[t * set.width + d]);
    }
}

}  // namespace
