// Inner loops of affine_shift for one instruction set, included by each_isa.h.
//
// y = x + s ((g - 1) x + b) = a x + c with a = 1 + s (g - 1) and c = s b, where low < x < high if there are bounds.

#include "sums.h"

inline float scale_of(float gain, float strength) { return fma1(strength, gain - 1.0f, 1.0f); }

// How the result is stored: into another buffer, into the source itself, or past the caches into another buffer. The
// last two ask for the next tokens early, because the processor does not follow several tokens at once by itself.
enum class Store { kPlain, kInPlace, kStream };

// Parameters of the channels of a row; low and high are null without bounds.
struct Maps {
    const float *gain, *bias, *low, *high;
    float strength;
};

// kTokens tokens at a time share the work on gain and bias.
template <class T, int kTokens, Store kStore, bool kBounded>
inline void affine_block(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, std::int64_t width,
                         const Maps& maps) {
    const Vec one = set1(1.0f), s = set1(maps.strength);
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec a0, a1, c0, c1, low0 = one, low1 = one, high0 = one, high1 = one;
        load2_as(T{}, maps.gain + d, a0, a1);
        load2_as(T{}, maps.bias + d, c0, c1);
        if (kBounded) {
            load2_as(T{}, maps.low + d, low0, low1);
            load2_as(T{}, maps.high + d, high0, high1);
        }
        a0 = fma(s, sub(a0, one), one);
        a1 = fma(s, sub(a1, one), one);
        c0 = mul(s, c0);
        c1 = mul(s, c1);
        for (int t = 0; t < kTokens; ++t) {
            const T* from = x + t * x_stride + d;
            T* to = y + t * y_stride + d;
            Vec v0, v1;
            load2(from, v0, v1);
            if (kStore != Store::kPlain) __builtin_prefetch(x + (t + kTokens) * x_stride + d);
            if (kBounded) {
                put2_where<T, kStore == Store::kStream>(to, from, within(v0, low0, high0), within(v1, low1, high1),
                                                        fma(a0, v0, c0), fma(a1, v1, c1));
            } else {
                put2<T, kStore == Store::kStream>(to, fma(a0, v0, c0), fma(a1, v1, c1));
            }
        }
    }
    for (; d < width; ++d) {
        const float a = scale_of(maps.gain[d], maps.strength), c = maps.strength * maps.bias[d];
        for (int t = 0; t < kTokens; ++t) {
            const T from = x[t * x_stride + d];
            const float v = to_float(from);
            const bool inside = !kBounded || (v > maps.low[d] && v < maps.high[d]);
            y[t * y_stride + d] = inside ? from_float<T>(fma1(a, v, c)) : from;
        }
    }
}

template <class T, Store kStore, bool kBounded>
inline void affine_tokens_as(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                             std::int64_t width, const Maps& maps) {
    std::int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
        affine_block<T, 4, kStore, kBounded>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, width, maps);
    }
    for (; t < tokens; ++t) {
        affine_block<T, 1, kStore, kBounded>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, width, maps);
    }
}

// Tokens of one row, channels next to each other.
template <class T, bool kBounded>
inline void affine_tokens_in(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                             std::int64_t width, const Maps& maps, bool streaming) {
    if (streaming && aligned_for_streams(y, y_stride)) {
        affine_tokens_as<T, Store::kStream, kBounded>(x, y, tokens, x_stride, y_stride, width, maps);
    } else if (x == y) {
        affine_tokens_as<T, Store::kInPlace, kBounded>(x, y, tokens, x_stride, y_stride, width, maps);
    } else {
        affine_tokens_as<T, Store::kPlain, kBounded>(x, y, tokens, x_stride, y_stride, width, maps);
    }
}

template <class T>
void affine_tokens(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                   std::int64_t width, const float* gain, const float* bias, const float* low, const float* high,
                   float strength, bool streaming) {
    const Maps maps{gain, bias, low, high, strength};
    if (low) {
        affine_tokens_in<T, true>(x, y, tokens, x_stride, y_stride, width, maps, streaming);
    } else {
        affine_tokens_in<T, false>(x, y, tokens, x_stride, y_stride, width, maps, streaming);
    }
}

template <class T, bool kStream, bool kBounded>
inline void affine_pack(const T* x, T* y, Vec a, Vec c, Vec low, Vec high) {
    Vec v0, v1;
    load2(x, v0, v1);
    if (kBounded) {
        const Mask m = within(v0, low, high), n = within(v1, low, high);
        put2_where<T, kStream>(y, x, m, n, fma(a, v0, c), fma(a, v1, c));
    } else {
        put2<T, kStream>(y, fma(a, v0, c), fma(a, v1, c));
    }
}

// y = scale x + shift where low < x < high.
template <class T, bool kBounded>
inline void affine_plane_in(const T* x, T* y, std::int64_t tokens, float scale, float shift, float low, float high,
                            bool streaming) {
    const Vec a = set1(scale), c = set1(shift), from = set1(low), to = set1(high);
    const auto single = [&](std::int64_t t) {
        const float v = to_float(x[t]);
        y[t] = !kBounded || (v > low && v < high) ? from_float<T>(fma1(scale, v, shift)) : x[t];
    };
    std::int64_t t = 0;
    if (streaming) {
        for (; t < tokens && !aligned_for_streams(y + t, 0); ++t) single(t);
        for (; t + 2 * kLanes <= tokens; t += 2 * kLanes) affine_pack<T, true, kBounded>(x + t, y + t, a, c, from, to);
    }
    for (; t + 2 * kLanes <= tokens; t += 2 * kLanes) affine_pack<T, false, kBounded>(x + t, y + t, a, c, from, to);
    for (; t < tokens; ++t) single(t);
}

// One channel of one row, tokens next to each other.
template <class T>
void affine_plane(const T* x, T* y, std::int64_t tokens, float gain, float bias, float strength, const float* low,
                  const float* high, bool streaming) {
    const float scale = scale_of(gain, strength), shift = strength * bias;
    if (low) {
        affine_plane_in<T, true>(x, y, tokens, scale, shift, *low, *high, streaming);
    } else {
        affine_plane_in<T, false>(x, y, tokens, scale, shift, 0.0f, 0.0f, streaming);
    }
}

// The sum over tokens of every channel.
template <class T>
void sum_tokens(const T* x, std::int64_t tokens, std::int64_t stride, std::int64_t width, float* sums) {
    std::fill(sums, sums + width, 0.0f);
    std::int64_t t = 0;
    for (; t + 4 <= tokens; t += 4, x += 4 * stride) {
        std::int64_t d = 0;
        for (; d + kLanes <= width; d += kLanes) {
            const Vec pair = add(load(x + d), load(x + stride + d));
            const Vec other = add(load(x + 2 * stride + d), load(x + 3 * stride + d));
            store(sums + d, add(load(sums + d), add(pair, other)));
        }
        for (; d < width; ++d) {
            const float pair = to_float(x[d]) + to_float(x[stride + d]);
            sums[d] += pair + (to_float(x[2 * stride + d]) + to_float(x[3 * stride + d]));
        }
    }
    for (; t < tokens; ++t, x += stride) {
        for (std::int64_t d = 0; d < width; ++d) sums[d] += to_float(x[d]);
    }
}
