// Inner loops of affine_shift for one instruction set, included by each_isa.h.
//
// y = x + s ((g - 1) x + b) = fma(s, fma(g - 1, x, b), x).

// kTokens tokens at a time share the loads of gain and bias.
template <class T, int kTokens, bool kStream>
inline void affine_block(const T* x, T* y, std::int64_t x_stride, std::int64_t y_stride, std::int64_t width,
                         const float* gain, const float* bias, float strength) {
    const Vec one = set1(1.0f), s = set1(strength);
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
        const Vec g = sub(load(gain + d), one), b = load(bias + d);
        for (int t = 0; t < kTokens; ++t) {
            const Vec v = load(x + t * x_stride + d);
            put<T, kStream>(y + t * y_stride + d, fma(s, fma(g, v, b), v));
        }
    }
    for (; d < width; ++d) {
        for (int t = 0; t < kTokens; ++t) {
            const float v = to_float(x[t * x_stride + d]);
            y[t * y_stride + d] = from_float<T>(fma1(strength, fma1(gain[d] - 1.0f, v, bias[d]), v));
        }
    }
}

template <class T, bool kStream>
inline void affine_tokens_as(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                             std::int64_t width, const float* gain, const float* bias, float strength) {
    std::int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
        affine_block<T, 4, kStream>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, width, gain, bias, strength);
    }
    for (; t < tokens; ++t) {
        affine_block<T, 1, kStream>(x + t * x_stride, y + t * y_stride, x_stride, y_stride, width, gain, bias, strength);
    }
    if (kStream) finish_streams();
}

// Tokens of one row, channels next to each other.
template <class T>
void affine_tokens(const T* x, T* y, std::int64_t tokens, std::int64_t x_stride, std::int64_t y_stride,
                   std::int64_t width, const float* gain, const float* bias, float strength, bool streaming) {
    const std::size_t line = kLanes * sizeof(T);
    const bool aligned = reinterpret_cast<std::uintptr_t>(y) % line == 0 && y_stride * sizeof(T) % line == 0;
    if (streaming && aligned) {
        affine_tokens_as<T, true>(x, y, tokens, x_stride, y_stride, width, gain, bias, strength);
    } else {
        affine_tokens_as<T, false>(x, y, tokens, x_stride, y_stride, width, gain, bias, strength);
    }
}

// One channel of one row, tokens next to each other.
template <class T>
void affine_plane(const T* x, T* y, std::int64_t tokens, float gain, float bias, float strength, bool streaming) {
    const Vec g = set1(gain - 1.0f), b = set1(bias), s = set1(strength);
    const std::size_t line = kLanes * sizeof(T);
    std::int64_t t = 0;
    const auto one = [&](std::int64_t i) {
        const float v = to_float(x[i]);
        y[i] = from_float<T>(fma1(strength, fma1(gain - 1.0f, v, bias), v));
    };
    if (streaming) {
        for (; t < tokens && reinterpret_cast<std::uintptr_t>(y + t) % line != 0; ++t) one(t);
        for (; t + kLanes <= tokens; t += kLanes) {
            const Vec v = load(x + t);
            stream(y + t, fma(s, fma(g, v, b), v));
        }
        finish_streams();
    }
    for (; t + kLanes <= tokens; t += kLanes) {
        const Vec v = load(x + t);
        store(y + t, fma(s, fma(g, v, b), v));
    }
    for (; t < tokens; ++t) one(t);
}
