// Inner loops of norm_affine for one instruction set, included by each_isa.h.
//
// With u = (x - mean) root the norm and the shift are one affine map, y = p u + q: p = a w and q = a c + s b with the
// norm's own w and c and a = 1 + s (g - 1). Rows that are left alone have p = w and q = c.

#include "sums.h"

// What p and q are made of; weight, norm_bias, and together gain and bias, may be null.
struct Folding {
    const float *weight, *norm_bias, *gain, *bias;
    float offset, strength;
};

struct Map1 {
    float p, q;
};
inline Map1 folded1(const Folding& f, std::int64_t d) {
    Map1 map{f.weight ? f.weight[d] + f.offset : 1.0f, f.norm_bias ? f.norm_bias[d] : 0.0f};
    if (f.gain) {
        const float a = fma1(f.strength, f.gain[d] - 1.0f, 1.0f);
        map = {map.p * a, fma1(a, map.q, f.strength * f.bias[d])};
    }
    return map;
}

// Of 2 kLanes channels, in the order that load2 has for elements of T; the same bits as those of one channel.
template <class T>
inline void folded2(T, const Folding& f, std::int64_t d, Vec& p0, Vec& p1, Vec& q0, Vec& q1) {
    const Vec one = set1(1.0f), s = set1(f.strength);
    p0 = p1 = one;
    q0 = q1 = zero();
    if (f.weight) {
        load2_as(T{}, f.weight + d, p0, p1);
        p0 = add(p0, set1(f.offset));
        p1 = add(p1, set1(f.offset));
    }
    if (f.norm_bias) load2_as(T{}, f.norm_bias + d, q0, q1);
    if (!f.gain) return;
    Vec a0, a1, b0, b1;
    load2_as(T{}, f.gain + d, a0, a1);
    load2_as(T{}, f.bias + d, b0, b1);
    a0 = fma(s, sub(a0, one), one);
    a1 = fma(s, sub(a1, one), one);
    p0 = mul(p0, a0);
    p1 = mul(p1, a1);
    q0 = fma(a0, q0, mul(s, b0));
    q1 = fma(a1, q1, mul(s, b1));
}

inline void fold_maps(std::int64_t width, const float* weight, const float* norm_bias, float offset, const float* gain,
                      const float* bias, float strength, float* p, float* q) {
    const Folding f{weight, norm_bias, gain, bias, offset, strength};
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec p0, p1, q0, q1;
        folded2(float{}, f, d, p0, p1, q0, q1);
        store(p + d, p0);
        store(p + d + kLanes, p1);
        store(q + d, q0);
        store(q + d + kLanes, q1);
    }
    for (; d < width; ++d) {
        const Map1 map = folded1(f, d);
        p[d] = map.p;
        q[d] = map.q;
    }
}

struct Scale {
    float mean, root;
};

inline Scale scale_from(double mean, double squares, std::int64_t count, float eps) {
    return {float(mean), 1.0f / std::sqrt(float(squares / double(count)) + eps)};
}

template <class T, bool kCentred>
inline Scale scale_of_token(const T* x, std::int64_t width, float eps) {
    const float mean = kCentred ? float(sum_of(x, width) / double(width)) : 0.0f;
    return scale_from(mean, squares_of(x, width, mean), width, eps);
}

// kTokens tokens at a time share the loads of p and q.
template <class T, int kTokens, bool kCentred, bool kStream>
inline void norm_block(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, std::int64_t width, float eps,
                       const float* p, const float* q) {
    Scale scales[kTokens];
    for (int t = 0; t < kTokens; ++t) scales[t] = scale_of_token<T, kCentred>(x + t * x_stride, width, eps);
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec p0, p1, q0, q1;
        load2_as(T{}, p + d, p0, p1);
        load2_as(T{}, q + d, q0, q1);
        for (int t = 0; t < kTokens; ++t) {
            Vec v0, v1;
            load2(x + t * x_stride + d, v0, v1);
            if (kCentred) {
                v0 = sub(v0, set1(scales[t].mean));
                v1 = sub(v1, set1(scales[t].mean));
            }
            const Vec root = set1(scales[t].root);
            put2<T, kStream>(y + t * y_stride + d, fma(mul(v0, root), p0, q0), fma(mul(v1, root), p1, q1));
        }
    }
    for (; d < width; ++d) {
        for (int t = 0; t < kTokens; ++t) {
            const float v = to_float(x[t * x_stride + d]) - scales[t].mean;
            y[t * y_stride + d] = from_float<T>(fma1(v * scales[t].root, p[d], q[d]));
        }
    }
}

template <class T, bool kCentred, bool kStream>
inline void norm_tokens_as(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                           std::int64_t width, float eps, const float* p, const float* q) {
    std::int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
        norm_block<T, 4, kCentred, kStream>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, width, eps, p, q);
    }
    for (; t < tokens; ++t) {
        norm_block<T, 1, kCentred, kStream>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, width, eps, p, q);
    }
}

// Tokens of one row, channels next to each other.
template <class T>
void norm_tokens(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                 std::int64_t width, bool centred, float eps, const float* p, const float* q, bool streaming) {
    const bool stream = streaming && aligned_for_streams(y, y_stride);
    const auto run = centred ? (stream ? norm_tokens_as<T, true, true> : norm_tokens_as<T, true, false>)
                             : (stream ? norm_tokens_as<T, false, true> : norm_tokens_as<T, false, false>);
    run(x, y, tokens, x_stride, y_stride, width, eps, p, q);
}

// One token whose p and q are not worth keeping.
template <class T, bool kCentred>
inline void norm_one_as(const T* x, T* y, std::int64_t width, float eps, const Folding& f) {
    const Scale scale = scale_of_token<T, kCentred>(x, width, eps);
    const Vec mean = set1(scale.mean), root = set1(scale.root);
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec p0, p1, q0, q1, v0, v1;
        folded2(T{}, f, d, p0, p1, q0, q1);
        load2(x + d, v0, v1);
        if (kCentred) {
            v0 = sub(v0, mean);
            v1 = sub(v1, mean);
        }
        put2<T, false>(y + d, fma(mul(v0, root), p0, q0), fma(mul(v1, root), p1, q1));
    }
    for (; d < width; ++d) {
        const Map1 map = folded1(f, d);
        y[d] = from_float<T>(fma1((to_float(x[d]) - scale.mean) * scale.root, map.p, map.q));
    }
}

template <class T>
void norm_one(const T* x, T* y, std::int64_t width, bool centred, float eps, const float* weight,
              const float* norm_bias, float offset, const float* gain, const float* bias, float strength) {
    const Folding f{weight, norm_bias, gain, bias, offset, strength};
    const auto run = centred ? norm_one_as<T, true> : norm_one_as<T, false>;
    run(x, y, width, eps, f);
}

// The group of channels `first` to `first + channels`, tokens next to each other: 1 / sqrt(var + eps) and the mean.
template <class T>
void scale_of_group(const T* x, std::int64_t channels, std::int64_t stride, std::int64_t tokens, float eps, float* mean,
                    float* root) {
    if (stride == tokens) {  // one piece of memory
        tokens *= channels;
        channels = 1;
    }
    Spread all;
    for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t t = 0; t < tokens; t += kPiece) {
            const T* piece = x + c * stride + t;
            const std::int64_t count = std::min(kPiece, tokens - t);
            const double centre = sum_of(piece, count) / double(count);
            // Around the centre as it is in fp32; what that is off by adds count * off² to the squares.
            const double off = centre - double(float(centre));
            all.merge(double(count), centre, squares_of(piece, count, float(centre)) - double(count) * off * off);
        }
    }
    const Scale scale = scale_from(all.mean, all.squares, std::int64_t(all.count), eps);
    *mean = scale.mean;
    *root = scale.root;
}

// Sums over tokens of every channel, channels next to each other: of x - p and of its squares, with p the first token.
template <class T>
void sums_of_tokens(const T* x, std::int64_t tokens, std::int64_t stride, std::int64_t width, float* sums,
                    float* squares) {
    std::fill(sums, sums + width, 0.0f);
    std::fill(squares, squares + width, 0.0f);
    for (std::int64_t t = 0; t < tokens; t += 4) {
        const int n = int(std::min<std::int64_t>(tokens - t, 4));
        const T* from = x + t * stride;
        std::int64_t d = 0;
        for (; d + kLanes <= width; d += kLanes) {
            const Vec pivot = load(x + d);
            Vec sum = load(sums + d), square = load(squares + d);
            for (int i = 0; i < n; ++i) {
                const Vec away = sub(load(from + i * stride + d), pivot);
                sum = add(sum, away);
                square = fma(away, away, square);
            }
            store(sums + d, sum);
            store(squares + d, square);
        }
        for (; d < width; ++d) {
            for (int i = 0; i < n; ++i) {
                const float away = to_float(from[i * stride + d]) - to_float(x[d]);
                sums[d] += away;
                squares[d] = fma1(away, away, squares[d]);
            }
        }
    }
}

// The group of channels that these sums over `tokens` tokens are of.
template <class T>
void merge_sums(Spread& all, const T* pivot, const float* sums, const float* squares, std::int64_t channels,
                std::int64_t tokens) {
    const double n = double(tokens);
    for (std::int64_t d = 0; d < channels; ++d) {
        const double away = double(sums[d]) / n;
        all.merge(n, double(to_float(pivot[d])) + away, std::max(double(squares[d]) - double(sums[d]) * away, 0.0));
    }
}

// y = p (x - mean) root + q with all four per channel, channels next to each other.
template <class T, bool kStream>
inline void norm_block_by_channel(const T* x, T* y, int tokens, std::int64_t x_stride, std::int64_t y_stride,
                                  std::int64_t width, const float* mean, const float* root, const float* p,
                                  const float* q) {
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec m0, m1, r0, r1, p0, p1, q0, q1;
        load2_as(T{}, mean + d, m0, m1);
        load2_as(T{}, root + d, r0, r1);
        load2_as(T{}, p + d, p0, p1);
        load2_as(T{}, q + d, q0, q1);
        for (int t = 0; t < tokens; ++t) {
            Vec v0, v1;
            load2(x + t * x_stride + d, v0, v1);
            v0 = fma(mul(sub(v0, m0), r0), p0, q0);
            v1 = fma(mul(sub(v1, m1), r1), p1, q1);
            put2<T, kStream>(y + t * y_stride + d, v0, v1);
        }
    }
    for (; d < width; ++d) {
        for (int t = 0; t < tokens; ++t) {
            const float v = (to_float(x[t * x_stride + d]) - mean[d]) * root[d];
            y[t * y_stride + d] = from_float<T>(fma1(v, p[d], q[d]));
        }
    }
}

template <class T>
void norm_tokens_by_channel(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                            std::int64_t width, const float* mean, const float* root, const float* p, const float* q,
                            bool streaming) {
    const auto run = streaming && aligned_for_streams(y, y_stride) ? norm_block_by_channel<T, true>
                                                                   : norm_block_by_channel<T, false>;
    for (std::int64_t t = 0; t < tokens; t += 4) {
        const int n = int(std::min<std::int64_t>(tokens - t, 4));
        run(x + t * x_stride, y + t * y_stride, n, x_stride, y_stride, width, mean, root, p, q);
    }
}

// Tokens of one channel, next to each other: y = p (x - mean) root + q.
template <class T>
void norm_plane(const T* x, T* y, std::int64_t tokens, float mean, float root, float p, float q, bool streaming) {
    const Vec m = set1(mean), r = set1(root), scale = set1(p), shift = set1(q);
    const auto single = [&](std::int64_t t) { y[t] = from_float<T>(fma1((to_float(x[t]) - mean) * root, p, q)); };
    std::int64_t t = 0;
    if (streaming) {
        for (; t < tokens && !aligned_for_streams(y + t, 0); ++t) single(t);
    }
    for (; t + 2 * kLanes <= tokens; t += 2 * kLanes) {
        Vec v0, v1;
        load2(x + t, v0, v1);
        v0 = fma(mul(sub(v0, m), r), scale, shift);
        v1 = fma(mul(sub(v1, m), r), scale, shift);
        if (streaming) {
            put2<T, true>(y + t, v0, v1);
        } else {
            put2<T, false>(y + t, v0, v1);
        }
    }
    for (; t < tokens; ++t) single(t);
}
