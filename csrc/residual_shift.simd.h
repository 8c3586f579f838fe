// Inner loops of residual_shift for one instruction set, included by each_isa.h.
//
// y = x + gate f', with f' = f or, where the row is steered, f' = a f + c with a = 1 + s (g - 1) and c = s b.

// A pair of vectors of another tensor, in the order that load2 has for the elements of the first.
template <class T>
inline void load2_beside(T, const T* p, Vec& a, Vec& b) {
    load2(p, a, b);
}
template <class F>
inline void load2_beside(float, const F* p, Vec& a, Vec& b) {
    a = load(p);
    b = load(p + kLanes);
}
inline void load2_beside(float, const float* p, Vec& a, Vec& b) { load2(p, a, b); }

// Of the channels of a row; gate may be null, and gain and bias are null where the row is left alone.
struct Branch {
    const float *gate, *gain, *bias;
    float strength;
};

// One of many channels: y = x + gate (a f + c).
struct Line {
    float gate, a, c;
};

inline Line line_of(const Branch& branch, std::int64_t d) {
    Line line{branch.gate ? branch.gate[d] : 1.0f, 1.0f, 0.0f};
    if (branch.gain) {
        line.a = fma1(branch.strength, branch.gain[d] - 1.0f, 1.0f);
        line.c = branch.strength * branch.bias[d];
    }
    return line;
}

template <bool kShift>
inline float residual1(const Line& line, float x, float f) {
    return fma1(line.gate, kShift ? fma1(line.a, f, line.c) : f, x);
}

template <class T, class F, int kTokens, bool kShift, bool kStream>
inline void residual_block(const T* x, const F* f, T* y, std::int64_t x_stride, std::int64_t f_stride,
                           std::int64_t y_stride, std::int64_t width, const Branch& branch) {
    const Vec one = set1(1.0f), s = set1(branch.strength);
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec g0 = one, g1 = one, a0 = one, a1 = one, c0 = one, c1 = one;
        if (branch.gate) load2_as(T{}, branch.gate + d, g0, g1);
        if (kShift) {
            load2_as(T{}, branch.gain + d, a0, a1);
            load2_as(T{}, branch.bias + d, c0, c1);
            a0 = fma(s, sub(a0, one), one);
            a1 = fma(s, sub(a1, one), one);
            c0 = mul(s, c0);
            c1 = mul(s, c1);
        }
        for (int t = 0; t < kTokens; ++t) {
            Vec v0, v1, f0, f1;
            load2(x + t * x_stride + d, v0, v1);
            load2_beside(T{}, f + t * f_stride + d, f0, f1);
            if (kTokens > 1) {
                __builtin_prefetch(x + (t + kTokens) * x_stride + d);
                __builtin_prefetch(f + (t + kTokens) * f_stride + d);
            }
            if (kShift) {
                f0 = fma(a0, f0, c0);
                f1 = fma(a1, f1, c1);
            }
            put2<T, kStream>(y + t * y_stride + d, fma(g0, f0, v0), fma(g1, f1, v1));
        }
    }
    for (; d < width; ++d) {
        const Line line = line_of(branch, d);
        for (int t = 0; t < kTokens; ++t) {
            const float v = to_float(x[t * x_stride + d]), w = to_float(f[t * f_stride + d]);
            y[t * y_stride + d] = from_float<T>(residual1<kShift>(line, v, w));
        }
    }
}

template <class T, class F, bool kShift, bool kStream>
inline void residual_tokens_as(const T* x, const F* f, T* y, std::int64_t tokens, std::int64_t x_stride,
                               std::int64_t f_stride, std::int64_t y_stride, std::int64_t width, const Branch& branch) {
    std::int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
        residual_block<T, F, 4, kShift, kStream>(x + t * x_stride, f + t * f_stride, y + t * y_stride, x_stride,
                                                 f_stride, y_stride, width, branch);
    }
    for (; t < tokens; ++t) {
        residual_block<T, F, 1, kShift, kStream>(x + t * x_stride, f + t * f_stride, y + t * y_stride, x_stride,
                                                 f_stride, y_stride, width, branch);
    }
}

// Tokens of one row, channels next to each other.
template <class T, class F>
void residual_tokens(const T* x, const F* f, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t f_stride,
                     std::int64_t y_stride, std::int64_t width, const float* gate, const float* gain, const float* bias,
                     float strength, bool streaming) {
    const Branch branch{gate, gain, bias, strength};
    const bool stream = streaming && aligned_for_streams(y, y_stride);
    const auto run = gain ? (stream ? residual_tokens_as<T, F, true, true> : residual_tokens_as<T, F, true, false>)
                          : (stream ? residual_tokens_as<T, F, false, true> : residual_tokens_as<T, F, false, false>);
    run(x, f, y, tokens, x_stride, f_stride, y_stride, width, branch);
}

template <class T, class F, bool kShift>
inline void residual_plane_as(const T* x, const F* f, T* y, std::int64_t tokens, const Line& line, bool streaming) {
    const Vec g = set1(line.gate), a = set1(line.a), c = set1(line.c);
    const auto single = [&](std::int64_t t) {
        y[t] = from_float<T>(residual1<kShift>(line, to_float(x[t]), to_float(f[t])));
    };
    std::int64_t t = 0;
    if (streaming) {
        for (; t < tokens && !aligned_for_streams(y + t, 0); ++t) single(t);
    }
    for (; t + 2 * kLanes <= tokens; t += 2 * kLanes) {
        Vec v0, v1, f0, f1;
        load2(x + t, v0, v1);
        load2_beside(T{}, f + t, f0, f1);
        if (kShift) {
            f0 = fma(a, f0, c);
            f1 = fma(a, f1, c);
        }
        if (streaming) {
            put2<T, true>(y + t, fma(g, f0, v0), fma(g, f1, v1));
        } else {
            put2<T, false>(y + t, fma(g, f0, v0), fma(g, f1, v1));
        }
    }
    for (; t < tokens; ++t) single(t);
}

// One channel of one row, tokens next to each other; gain and bias point to its own, or are null.
template <class T, class F>
void residual_plane(const T* x, const F* f, T* y, std::int64_t tokens, const float* gate, const float* gain,
                    const float* bias, float strength, bool streaming) {
    const Line line = line_of({gate, gain, bias, strength}, 0);
    if (gain) {
        residual_plane_as<T, F, true>(x, f, y, tokens, line, streaming);
    } else {
        residual_plane_as<T, F, false>(x, f, y, tokens, line, streaming);
    }
}
