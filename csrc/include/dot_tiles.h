// Dot products of several tokens with several weights, for kernel files that each_isa.h compiles: include it after
// simd.h, inside the namespace of the instruction set. No include guard.
//
// Every product is added up in the same order whatever the tile it is part of, so that the same token and the same
// weights give the same bits in every tile.

inline Vec load_rest(const float* p, int n) { return load_first(p, n); }

template <class T>
inline Vec load_rest(const T* p, int n) {
    float values[kLanes];
    for (int i = 0; i < n; ++i) values[i] = to_float(p[i]);
    return load_first(values, n);
}

// scores[t * kWeights + k] of kTokens tokens x[t] with kWeights weights w[k]: 1, 2 or a multiple of 4.
template <int kTokens, int kWeights, class X, class W>
inline void dot_tile(const X* x, std::int64_t stride, const W* const* w, std::int64_t width, float* scores) {
    Vec sum[kTokens * kWeights];
    for (Vec& each : sum) each = zero();
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
        Vec weights[kWeights];
        for (int k = 0; k < kWeights; ++k) weights[k] = load(w[k] + d);
        for (int t = 0; t < kTokens; ++t) {
            const Vec v = load(x + t * stride + d);
            for (int k = 0; k < kWeights; ++k) sum[t * kWeights + k] = fma(v, weights[k], sum[t * kWeights + k]);
        }
    }
    if (const int rest = int(width - d)) {
        for (int k = 0; k < kWeights; ++k) {
            const Vec weights = load_rest(w[k] + d, rest);
            for (int t = 0; t < kTokens; ++t) {
                sum[t * kWeights + k] = fma(load_rest(x + t * stride + d, rest), weights, sum[t * kWeights + k]);
            }
        }
    }
    constexpr int kAll = kTokens * kWeights;
    for (int i = 0; i + 4 <= kAll; i += 4) sum4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3], scores + i);
    if (constexpr int kRest = kAll % 4) {
        const auto at = [&](int i) { return i < kRest ? sum[kAll - kRest + i] : zero(); };
        float four[4];
        sum4(at(0), at(1), at(2), at(3), four);
        for (int i = 0; i < kRest; ++i) scores[kAll - kRest + i] = four[i];
    }
}

// Tokens as floats next to each other: where they lie, or converted into scratch of [tokens, width].
inline const float* as_floats(const float* x, std::int64_t stride, std::int64_t, std::int64_t, float*,
                              std::int64_t* scratch_stride) {
    *scratch_stride = stride;
    return x;
}

template <class T>
inline void to_floats(const T* from, float* to, std::int64_t width) {
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(to + d, load(from + d));
    for (; d < width; ++d) to[d] = to_float(from[d]);
}

template <class T>
inline const float* as_floats(const T* x, std::int64_t stride, std::int64_t tokens, std::int64_t width, float* scratch,
                              std::int64_t* scratch_stride) {
    for (std::int64_t t = 0; t < tokens; ++t) to_floats(x + t * stride, scratch + t * width, width);
    *scratch_stride = width;
    return scratch;
}
