// Inner loops of low_rank_shift for one instruction set, included by each_isa.h.
//
// A block of tokens stays in the cache between its two passes: z = x·read_k for all k, then y = x + s (b + z write).

#include "dot_tiles.h"

namespace {

#if PYSTEER_ISA_LEVEL >= 3
constexpr int kTokensAtOnce = 6;
#elif PYSTEER_ISA_LEVEL == 2
constexpr int kTokensAtOnce = 3;
#else
constexpr int kTokensAtOnce = 1;
#endif

// y of kTokens tokens from z [kTokens][kLargestRank].
template <class T, int kTokens, bool kStream>
inline void write_tile(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, const RankSet& set,
                       const float* z) {
    const Vec s = set1(set.strength);
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= set.width; d += 2 * kLanes) {
        Vec a[kTokens], c[kTokens], u0, u1;
        load2_as(T{}, set.bias + d, u0, u1);
        for (int t = 0; t < kTokens; ++t) {
            a[t] = u0;
            c[t] = u1;
        }
        for (std::int64_t k = 0; k < set.rank; ++k) {
            load2_as(T{}, set.write + k * set.width + d, u0, u1);
            for (int t = 0; t < kTokens; ++t) {
                const Vec weight = set1(z[t * kLargestRank + k]);
                a[t] = fma(weight, u0, a[t]);
                c[t] = fma(weight, u1, c[t]);
            }
        }
        for (int t = 0; t < kTokens; ++t) {
            Vec v0, v1;
            load2(x + t * x_stride + d, v0, v1);
            put2<T, kStream>(y + t * y_stride + d, fma(s, a[t], v0), fma(s, c[t], v1));
        }
    }
    for (; d < set.width; ++d) {
        for (int t = 0; t < kTokens; ++t) {
            float shift = set.bias[d];
            for (std::int64_t k = 0; k < set.rank; ++k) {
                shift = fma1(z[t * kLargestRank + k], set.write[k * set.width + d], shift);
            }
            y[t * y_stride + d] = from_float<T>(fma1(set.strength, shift, to_float(x[t * x_stride + d])));
        }
    }
}

// z[t][first ...] of kTokens tokens with kRanks vectors.
template <int kTokens, int kRanks>
inline void read_tile(const float* x, std::int64_t stride, const RankSet& set, std::int64_t first, float* z) {
    const float* v[kRanks];
    for (int k = 0; k < kRanks; ++k) v[k] = set.read + (first + k) * set.width;
    float found[kTokens * kRanks];
    dot_tile<kTokens, kRanks>(x, stride, v, set.width, found);
    for (int t = 0; t < kTokens; ++t) {
        for (int k = 0; k < kRanks; ++k) z[t * kLargestRank + first + k] = found[t * kRanks + k];
    }
}

// scratch: [kTokens, width] floats.
template <class T, int kTokens>
inline void shift_tile(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, const RankSet& set,
                       bool past_caches, float* scratch) {
    float z[kTokens * kLargestRank];
    std::int64_t stride = 0, k = 0;
    const float* floats = as_floats(x, x_stride, kTokens, set.width, scratch, &stride);
    for (; k + 4 <= set.rank; k += 4) read_tile<kTokens, 4>(floats, stride, set, k, z);
    for (; k + 2 <= set.rank; k += 2) read_tile<kTokens, 2>(floats, stride, set, k, z);
    for (; k < set.rank; ++k) read_tile<kTokens, 1>(floats, stride, set, k, z);
    if (past_caches) {
        write_tile<T, kTokens, true>(x, y, x_stride, y_stride, set, z);
    } else {
        write_tile<T, kTokens, false>(x, y, x_stride, y_stride, set, z);
    }
}

constexpr int kVectors = PYSTEER_ISA_LEVEL >= 2 ? 2 : 8;  // of tokens next to each other
constexpr int kRanks = PYSTEER_ISA_LEVEL >= 3 ? 8 : 4;    // that are read together

// z[k][tokens] of one strip of tokens for kRanks vectors from k on, d running over the channels.
template <class T>
inline void read_strip(const T* x, std::int64_t stride, const RankSet& set, std::int64_t first, float* z) {
    Vec sum[kRanks][kVectors];
    const float* v[kRanks];
    for (int k = 0; k < kRanks; ++k) {
        v[k] = set.read + std::min(first + k, set.rank - 1) * set.width;
        for (int i = 0; i < kVectors; ++i) sum[k][i] = zero();
    }
    for (std::int64_t d = 0; d < set.width; ++d) {
        Vec value[kVectors];
        for (int i = 0; i < kVectors; i += 2) load2(x + d * stride + i * kLanes, value[i], value[i + 1]);
        for (int k = 0; k < kRanks; ++k) {
            const Vec weight = set1(v[k][d]);
            for (int i = 0; i < kVectors; ++i) sum[k][i] = fma(weight, value[i], sum[k][i]);
        }
    }
    for (int k = 0; k < kRanks && first + k < set.rank; ++k) {
        for (int i = 0; i < kVectors; ++i) store(z + ((first + k) * kVectors + i) * kLanes, sum[k][i]);
    }
}

}  // namespace

// Tokens of one row, channels next to each other. scratch: as many floats as kMostTokens tokens have.
template <class T>
void low_rank_tokens(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                     const RankSet& set, bool streaming, float* scratch) {
    const bool past_caches = streaming && aligned_for_streams(y, y_stride);
    std::int64_t t = 0;
    for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce) {
        shift_tile<T, kTokensAtOnce>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, set, past_caches, scratch);
    }
    for (; t < tokens; ++t) {
        shift_tile<T, 1>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, set, past_caches, scratch);
    }
}

// Tokens of one row, tokens next to each other; those that do not fill a strip are turned over into scratch and back.
template <class T>
void low_rank_channels(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                       const RankSet& set, float* scratch) {
    constexpr int strip = kVectors * kLanes;
    float z[kLargestRank * strip];
    std::int64_t t = 0;
    for (; t + strip <= tokens; t += strip) {
        for (std::int64_t k = 0; k < set.rank; k += kRanks) read_strip(x + t, x_stride, set, k, z);
        const Vec s = set1(set.strength);
        for (std::int64_t d = 0; d < set.width; ++d) {
            for (int i = 0; i < kVectors; i += 2) {
                Vec a = set1(set.bias[d]), c = a, v0, v1;
                for (std::int64_t k = 0; k < set.rank; ++k) {
                    const Vec u = set1(set.write[k * set.width + d]);
                    a = fma(u, load(z + (k * kVectors + i) * kLanes), a);
                    c = fma(u, load(z + (k * kVectors + i + 1) * kLanes), c);
                }
                load2(x + d * x_stride + t + i * kLanes, v0, v1);
                put2<T, false>(y + d * y_stride + t + i * kLanes, fma(s, a, v0), fma(s, c, v1));
            }
        }
    }
    const std::int64_t rest = tokens - t;
    for (std::int64_t d = 0; d < set.width; ++d) {
        for (std::int64_t i = 0; i < rest; ++i) scratch[i * set.width + d] = to_float(x[d * x_stride + t + i]);
    }
    low_rank_tokens(scratch, scratch, rest, set.width, set.width, set, false, scratch);
    for (std::int64_t d = 0; d < set.width; ++d) {
        for (std::int64_t i = 0; i < rest; ++i) y[d * y_stride + t + i] = from_float<T>(scratch[i * set.width + d]);
    }
}
