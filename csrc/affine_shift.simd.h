// Inner loops of affine_shift for one instruction set, included by each_isa.h.
//
// y = x + s ((g - 1) x + b) = a x + c with a = 1 + s (g - 1) and c = s b.

inline float scale_of(float gain, float strength) { return fma1(strength, gain - 1.0f, 1.0f); }

// How the result is stored: into another buffer, into the source itself, or past the caches into another buffer. The
// last two ask for the next tokens early, because the processor does not follow several tokens at once by itself.
enum class Store { kPlain, kInPlace, kStream };

// kTokens tokens at a time share the work on gain and bias.
template <class T, int kTokens, Store kStore>
inline void affine_block(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, std::int64_t width,
                         const float* gain, const float* bias, float strength) {
    const Vec one = set1(1.0f), s = set1(strength);
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        Vec a0, a1, c0, c1;
        load2_as(T{}, gain + d, a0, a1);
        load2_as(T{}, bias + d, c0, c1);
        a0 = fma(s, sub(a0, one), one);
        a1 = fma(s, sub(a1, one), one);
        c0 = mul(s, c0);
        c1 = mul(s, c1);
        for (int t = 0; t < kTokens; ++t) {
            Vec v0, v1;
            load2(x + t * x_stride + d, v0, v1);
            if (kStore != Store::kPlain) __builtin_prefetch(x + (t + kTokens) * x_stride + d);
            put2<T, kStore == Store::kStream>(y + t * y_stride + d, fma(a0, v0, c0), fma(a1, v1, c1));
        }
    }
    for (; d < width; ++d) {
        const float a = scale_of(gain[d], strength), c = strength * bias[d];
        for (int t = 0; t < kTokens; ++t) {
            y[t * y_stride + d] = from_float<T>(fma1(a, to_float(x[t * x_stride + d]), c));
        }
    }
}

template <class T, Store kStore>
inline void affine_tokens_as(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                             std::int64_t width, const float* gain, const float* bias, float strength) {
    std::int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
        affine_block<T, 4, kStore>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, width, gain, bias, strength);
    }
    for (; t < tokens; ++t) {
        affine_block<T, 1, kStore>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, width, gain, bias, strength);
    }
}

// Tokens of one row, channels next to each other.
template <class T>
void affine_tokens(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                   std::int64_t width, const float* gain, const float* bias, float strength, bool streaming) {
    if (streaming && aligned_for_streams(y, y_stride)) {
        affine_tokens_as<T, Store::kStream>(x, y, tokens, x_stride, y_stride, width, gain, bias, strength);
    } else if (x == y) {
        affine_tokens_as<T, Store::kInPlace>(x, y, tokens, x_stride, y_stride, width, gain, bias, strength);
    } else {
        affine_tokens_as<T, Store::kPlain>(x, y, tokens, x_stride, y_stride, width, gain, bias, strength);
    }
}

// One channel of one row, tokens next to each other.
template <class T>
void affine_plane(const T* x, T* y, std::int64_t tokens, float gain, float bias, float strength, bool streaming) {
    const float scale = scale_of(gain, strength), shift = strength * bias;
    const Vec a = set1(scale), c = set1(shift);
    std::int64_t t = 0;
    Vec v0, v1;
    if (streaming) {
        for (; t < tokens && !aligned_for_streams(y + t, 0); ++t)
            y[t] = from_float<T>(fma1(scale, to_float(x[t]), shift));
        for (; t + 2 * kLanes <= tokens; t += 2 * kLanes) {
            load2(x + t, v0, v1);
            put2<T, true>(y + t, fma(a, v0, c), fma(a, v1, c));
        }
    }
    for (; t + 2 * kLanes <= tokens; t += 2 * kLanes) {
        load2(x + t, v0, v1);
        put2<T, false>(y + t, fma(a, v0, c), fma(a, v1, c));
    }
    for (; t < tokens; ++t) y[t] = from_float<T>(fma1(scale, to_float(x[t]), shift));
}
