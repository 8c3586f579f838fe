// Inner loops of sae_edit for one instruction set, included by each_isa.h.

namespace {  // names repeat between kernel files

#include "dot_tiles.h"
#include "panels.simd.h"

template <int kTokens, class X>
inline void scores_of(const X* x, std::int64_t stride, std::int64_t width, const float* vectors, std::int64_t count,
                      float* scores) {
    const auto tile = [&](auto weights, std::int64_t e) {
        constexpr int kWeights = decltype(weights)::value;
        const float* w[kWeights];
        float found[kTokens * kWeights];
        for (int i = 0; i < kWeights; ++i) w[i] = vectors + (e + i) * width;
        dot_tile<kTokens, kWeights>(x, stride, w, width, found);
        for (int t = 0; t < kTokens; ++t) {
            for (int i = 0; i < kWeights; ++i) scores[t * count + e + i] = found[t * kWeights + i];
        }
    };
    std::int64_t e = 0;
    for (; e + 4 <= count; e += 4) tile(std::integral_constant<int, 4>{}, e);
    if (e + 2 <= count) {
        tile(std::integral_constant<int, 2>{}, e);
        e += 2;
    }
    if (e < count) tile(std::integral_constant<int, 1>{}, e);
}

template <class X>
inline void score_all(const X* x, std::int64_t stride, std::int64_t tokens, std::int64_t width, const float* vectors,
                      std::int64_t count, float* scores) {
    std::int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) scores_of<4>(x + t * stride, stride, width, vectors, count, scores + t * count);
    for (; t < tokens; ++t) scores_of<1>(x + t * stride, stride, width, vectors, count, scores + t * count);
}

// scores[t, e] = x_t · vectors_e for tokens whose channels are next to each other. scratch: [tokens, width].
template <class T>
void score_tokens(const T* x, std::int64_t stride, std::int64_t tokens, std::int64_t width, const float* vectors,
                  std::int64_t count, float* scratch, float* scores) {
    if (count <= 4) {  // converted once
        score_all(x, stride, tokens, width, vectors, count, scores);
    } else {
        std::int64_t apart = 0;
        const float* floats = as_floats(x, stride, tokens, width, scratch, &apart);
        score_all(floats, apart, tokens, width, vectors, count, scores);
    }
}

// kVecs vectors of tokens that are next to each other, with kCount vectors of channels.
template <int kVecs, int kCount, class T>
inline void score_columns(const T* x, std::int64_t stride, std::int64_t width, const float* vectors, std::int64_t count,
                          float* scores) {
    Vec even[kCount * kVecs], odd[kCount * kVecs];
    for (int i = 0; i < kCount * kVecs; ++i) even[i] = odd[i] = zero();
    const auto add = [&](std::int64_t d, Vec* sum) {
        Vec v[kVecs];
        for (int j = 0; j < kVecs; ++j) v[j] = load(x + d * stride + j * kLanes);
        for (int e = 0; e < kCount; ++e) {
            const Vec w = set1(vectors[e * width + d]);
            for (int j = 0; j < kVecs; ++j) sum[e * kVecs + j] = fma(v[j], w, sum[e * kVecs + j]);
        }
    };
    std::int64_t d = 0;
    for (; d + 2 <= width; d += 2) {
        __builtin_prefetch(x + (d + 16) * stride);
        __builtin_prefetch(x + (d + 17) * stride);
        add(d, even);
        add(d + 1, odd);
    }
    if (d < width) add(d, even);
    float sums[kVecs * kLanes];
    for (int e = 0; e < kCount; ++e) {
        for (int j = 0; j < kVecs; ++j) {
            store(sums + j * kLanes, fma(set1(1.0f), even[e * kVecs + j], odd[e * kVecs + j]));
        }
        for (int t = 0; t < kVecs * kLanes; ++t) scores[t * count + e] = sums[t];
    }
}

template <class T>
inline float score_one(const T* x, std::int64_t stride, std::int64_t width, const float* vector) {
    float sums[2] = {0.0f, 0.0f};
    for (std::int64_t d = 0; d < width; ++d) sums[d % 2] = fma1(to_float(x[d * stride]), vector[d], sums[d % 2]);
    return fma1(1.0f, sums[0], sums[1]);
}

// scores[t, e] for tokens that are next to each other.
template <class T>
void score_channels(const T* x, std::int64_t stride, std::int64_t tokens, std::int64_t width, const float* vectors,
                    std::int64_t count, float* scores) {
    for (std::int64_t e = 0; e < count; e += 2) {
        const bool two = e + 2 <= count;
        const float* w = vectors + e * width;
        float* to = scores + e;
        std::int64_t t = 0;
        for (; t + 4 * kLanes <= tokens; t += 4 * kLanes) {
            const auto columns = two ? score_columns<4, 2, T> : score_columns<4, 1, T>;
            columns(x + t, stride, width, w, count, to + t * count);
        }
        for (; t + kLanes <= tokens; t += kLanes) {
            const auto columns = two ? score_columns<1, 2, T> : score_columns<1, 1, T>;
            columns(x + t, stride, width, w, count, to + t * count);
        }
        for (; t < tokens; ++t) {
            for (int i = 0; i <= int(two); ++i) {
                to[t * count + i] = score_one(x + t, stride, width, w + i * width);
            }
        }
    }
}

// y = x + sum_i weights[i] rows[i]
template <class T, bool kStream>
inline void add_vectors(const T* x, T* y, std::int64_t width, int count, const float* weights,
                        const float* const* rows) {
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec v0, v1, u0, u1;
        load2(x + d, v0, v1);
        for (int i = 0; i < count; ++i) {
            load2_as(T{}, rows[i] + d, u0, u1);
            v0 = fma(set1(weights[i]), u0, v0);
            v1 = fma(set1(weights[i]), u1, v1);
        }
        put2<T, kStream>(y + d, v0, v1);
    }
    for (; d < width; ++d) {
        float v = to_float(x[d]);
        for (int i = 0; i < count; ++i) v = fma1(weights[i], rows[i][d], v);
        y[d] = from_float<T>(v);
    }
}

// y_t = x_t + sum_e weights[t, e] vectors_e; a token whose weights are all 0 keeps its bits. used, rows: [count].
template <class T>
void add_to_tokens(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, std::int64_t tokens,
                   std::int64_t width, const float* vectors, std::int64_t count, const float* weights, bool streaming,
                   float* used, const float** rows) {
    const bool past_caches = streaming && aligned_for_streams(y, y_stride);
    for (std::int64_t t = 0; t < tokens; ++t) {
        int some = 0;
        for (std::int64_t e = 0; e < count; ++e) {
            if (weights[t * count + e] == 0.0f) continue;
            used[some] = weights[t * count + e];
            rows[some++] = vectors + e * width;
        }
        const T* from = x + t * x_stride;
        T* to = y + t * y_stride;
        if (some == 0) {
            if (from != to) std::memcpy(to, from, width * sizeof(T));
        } else if (past_caches) {
            add_vectors<T, true>(from, to, width, some, used, rows);
        } else {
            add_vectors<T, false>(from, to, width, some, used, rows);
        }
    }
}

template <class T>
struct Bits;
template <>
struct Bits<float> {
    using Type = std::uint32_t;
};
template <>
struct Bits<BFloat16> {
    using Type = std::uint16_t;
};
template <>
struct Bits<Float16> {
    using Type = std::uint16_t;
};

// kVecs vectors of tokens: y = x + sum_i weights[i] vectors[i][d], by[i] tokens apart; where `keep` is given, tokens
// with ones in it keep their bits.
template <int kVecs, class T>
inline void add_columns(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, std::int64_t width,
                        const float* const* vectors, int count, const float* weights, std::int64_t by,
                        const typename Bits<T>::Type* keep) {
    using Word = typename Bits<T>::Type;
    for (std::int64_t d = 0; d < width; ++d) {
        const T* from = x + d * x_stride;
        T* to = y + d * y_stride;
        Vec v[kVecs];
        for (int j = 0; j < kVecs; ++j) v[j] = load(from + j * kLanes);
        for (int i = 0; i < count; ++i) {
            const Vec u = set1(vectors[i][d]);
            for (int j = 0; j < kVecs; ++j) v[j] = fma(load(weights + i * by + j * kLanes), u, v[j]);
        }
        if (!keep) {
            for (int j = 0; j < kVecs; ++j) store(to + j * kLanes, v[j]);
            continue;
        }
        constexpr int kAll = kVecs * kLanes;
        T changed[kAll];
        Word before[kAll], after[kAll];
        for (int j = 0; j < kVecs; ++j) store(changed + j * kLanes, v[j]);
        std::memcpy(before, from, sizeof before);
        std::memcpy(after, changed, sizeof after);
        for (int t = 0; t < kAll; ++t) after[t] = Word((before[t] & keep[t]) | (after[t] & ~keep[t]));
        std::memcpy(to, after, sizeof after);
    }
}

// The same for tokens that are next to each other; weights: [count, by], kept: [tokens], 1 where all weights are 0.
template <class T>
void add_to_channels(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, std::int64_t tokens,
                     std::int64_t width, const float* const* vectors, int count, const float* weights, std::int64_t by,
                     const std::uint8_t* kept) {
    constexpr int kMost = 4;
    typename Bits<T>::Type keep[kMost * kLanes];
    std::int64_t t = 0;
    const auto several = [&](auto vecs) {
        constexpr int kAll = decltype(vecs)::value * kLanes;
        int left = 0;
        for (int i = 0; i < kAll; ++i) {
            keep[i] = typename Bits<T>::Type(kept[t + i] ? ~0u : 0u);
            left += kept[t + i];
        }
        if (left < kAll || x != y) {
            add_columns<decltype(vecs)::value>(x + t, y + t, x_stride, y_stride, width, vectors,
                                               left < kAll ? count : 0, weights + t, by, left ? keep : nullptr);
        }
        t += kAll;
    };
    while (t + kMost * kLanes <= tokens) several(std::integral_constant<int, kMost>{});
    while (t + kLanes <= tokens) several(std::integral_constant<int, 1>{});
    for (; t < tokens; ++t) {
        for (std::int64_t d = 0; d < width; ++d) {
            const T from = x[d * x_stride + t];
            float v = to_float(from);
            for (int i = 0; i < count; ++i) v = fma1(weights[i * by + t], vectors[i][d], v);
            y[d * y_stride + t] = kept[t] ? from : from_float<T>(v);
        }
    }
}

// One token as floats next to each other.
template <class T>
void gather_token(const T* x, std::int64_t stride, std::int64_t width, float* to) {
    if (stride == 1) {
        to_floats(x, to, width);
    } else {
        for (std::int64_t d = 0; d < width; ++d) to[d] = to_float(x[d * stride]);
    }
}

#include "sae_edit_ranks.simd.h"

}  // namespace
