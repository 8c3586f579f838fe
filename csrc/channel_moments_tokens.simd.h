// channel_moments of activations whose channels lie next to each other: tokens in groups, a step of channels at a time.
// Part of channel_moments.simd.h, inside its namespaces.

// What is known of one step of channels between two groups of tokens.
template <class T>
struct Known {
    float value[kStep], square[kStep], size[kStep];
    typename Step<T>::Bits largest[kStep], highest[kStep], lowest[kStep], nears[kStep], zeros[kStep];

    static void begin(Known* known) {
        std::memset(known, 0, sizeof *known);
        const Order<T> empty = Order<T>::empty();
        empty.largest.write(known->largest);
        empty.lowest.write(known->lowest);
    }
};

constexpr int kTogether = 16;  // tokens that share the reading and writing of what is known

inline void add_to(float* sum, Vec v) { store(sum, plus(load(sum), v)); }

// kTokens tokens of one step of channels.
template <int kTokens, class T>
inline void tokens_step(const T* x, std::int64_t stride, Step<T> near, Known<T>* known) {
    Order<T> seen{Step<T>::read(known->largest), Step<T>::read(known->highest), Step<T>::read(known->lowest)};
    Counts<T> counts{Step<T>::read(known->nears), Step<T>::read(known->zeros)};
    Sums a = no_sums(), b = no_sums();
    for (int t = 0; t < kTokens; ++t) {
        __builtin_prefetch(x + (t + kTokens) * stride);  // the processor does not follow several tokens by itself
        if (sizeof(T) == 4) __builtin_prefetch(x + (t + kTokens) * stride + kLanes);
        const Step<T> step = Step<T>::read(x + t * stride), size = step.sizes();
        Vec v, w, p, q;
        step.floats(v, w);
        size.floats(p, q);
        a.take(v, p);
        b.take(w, q);
        seen.take(step, size);
        counts.take(size, near);
    }
    add_to(known->value, a.value);
    add_to(known->value + kLanes, b.value);
    add_to(known->square, a.square);
    add_to(known->square + kLanes, b.square);
    add_to(known->size, a.size);
    add_to(known->size + kLanes, b.size);
    seen.largest.write(known->largest);
    seen.highest.write(known->highest);
    seen.lowest.write(known->lowest);
    counts.nears.write(known->nears);
    counts.zeros.write(known->zeros);
}

#if PYSTEER_ISA_LEVEL == 2
// One half of a step of fp32, kTokens tokens of it: the sums of a whole one do not fit in the registers of AVX2.
template <int kTokens>
inline void tokens_half(const float* x, std::int64_t stride, Ints near, Known<float>* known, int at) {
    Vec value = zero(), square = zero(), size = zero();
    Ints largest = read_ints(known->largest + at), highest = read_ints(known->highest + at);
    Ints lowest = read_ints(known->lowest + at), nears = read_ints(known->nears + at);
    Ints zeros = read_ints(known->zeros + at);
    for (int t = 0; t < kTokens; ++t) {
        __builtin_prefetch(x + (t + kTokens) * stride);  // the processor does not follow several tokens by itself
        const Ints bits = read_ints(x + t * stride), sizes = both_of(bits, all32(0x7fffffffu));
        const Vec v = as_floats(bits);
        value = plus(value, v);
        square = fma(v, v, square);
        size = plus(size, as_floats(sizes));
        largest = max_s32(largest, bits);
        highest = max_u32(highest, bits);
        lowest = min_u32(lowest, sizes);
        nears = count_below32(nears, sizes, near);
        zeros = count_zeros32(zeros, sizes);
    }
    add_to(known->value + at, value);
    add_to(known->square + at, square);
    add_to(known->size + at, size);
    write_ints(known->largest + at, largest);
    write_ints(known->highest + at, highest);
    write_ints(known->lowest + at, lowest);
    write_ints(known->nears + at, nears);
    write_ints(known->zeros + at, zeros);
}

template <int kTokens>
inline void tokens_step(const float* x, std::int64_t stride, Step<float> near, Known<float>* known) {
    tokens_half<kTokens>(x, stride, near.v, known, 0);
    tokens_half<kTokens>(x + kLanes, stride, near.w, known, kLanes);
}
#endif

// Sums around the centres of one step of channels, where one of its channels asks for them.
template <class T>
inline void centred_step(const T* x, std::int64_t stride, std::int64_t tokens, const float* centres, float* sums) {
    const Vec c = load(centres), d = load(centres + kLanes);
    Vec value[2] = {zero(), zero()}, square[2] = {zero(), zero()};
    for (std::int64_t t = 0; t < tokens; ++t) {
        Vec v, w;
        Step<T>::read(x + t * stride).floats(v, w);
        v = sub(v, c);
        w = sub(w, d);
        value[0] = plus(value[0], v);
        value[1] = plus(value[1], w);
        square[0] = fma(v, v, square[0]);
        square[1] = fma(w, w, square[1]);
    }
    for (int i = 0; i < 2; ++i) {
        store(sums + i * kLanes, value[i]);
        store(sums + (2 + i) * kLanes, square[i]);
    }
}

// Minimum and maximum of every lane of two vectors, in the order of the sums.
template <class T>
inline void extremes(const Known<T>& known, float* minimum, float* maximum) {
    float largest[kStep], highest[kStep], lowest[kStep];
    Vec a, b;
    Step<T>::read(known.largest).floats(a, b);
    store(largest, a);
    store(largest + kLanes, b);
    Step<T>::read(known.highest).floats(a, b);
    store(highest, a);
    store(highest + kLanes, b);
    Step<T>::read(known.lowest).floats(a, b);
    store(lowest, a);
    store(lowest + kLanes, b);
    for (int i = 0; i < kStep; ++i) {
        const float most = std::int32_t(bits_of(largest[i])) < 0 ? -lowest[i] : largest[i];
        const float least = std::int32_t(bits_of(highest[i])) < 0 ? highest[i] : lowest[i];
        const bool fine = (most == most) & (least == least);
        maximum[i] = fine ? most : __builtin_nanf("");
        minimum[i] = fine ? least : __builtin_nanf("");
    }
}

// The lanes whose sums fp32 does not hold well enough, once more.
template <class T>
__attribute__((noinline)) void settle_step(const T* x, std::int64_t stride, std::int64_t tokens, const Known<T>& known,
                                           double* out, std::int64_t width) {
    const double n = double(tokens);
    float centres[kStep], again[4 * kLanes];
    for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < kLanes; ++lane) {
            centres[half * kLanes + lane] = float(out[width + place<T>(half, lane)]);
        }
    }
    centred_step(x, stride, tokens, centres, again);
    for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int i = place<T>(half, lane), at = half * kLanes + lane;
            ChannelBlock found;
            if (!in_range(known.value[at], known.square[at])) {
                const Block block{1, tokens, 0, stride};
                careful_sums(x + i, block, 0.0, &found);
                if (found.mean - found.mean == 0) careful_sums(x + i, block, found.mean, &found);
                out[5 * width + i] = found.mean_abs;
            } else if (!settled(known.value[at], known.square[at], known.size[at], 1 / n, &found)) {
                const double value = again[at], square = again[2 * kLanes + at];
                found.mean = double(centres[at]) + value / n;
                found.m2 = square - value * value / n;
            }
            out[width + i] = found.mean;
            out[2 * width + i] = found.m2;
        }
    }
}

// From what is known of one step of channels to the statistics of each: out is [8][width], at the first of them.
template <class T>
inline void finish_step(const T* x, std::int64_t stride, std::int64_t tokens, const Known<T>& known, double* out,
                        std::int64_t width) {
    const double n = double(tokens), one_by_n = 1 / n;
    constexpr double huge = __builtin_huge_val();
    float least[kStep], most[kStep];
    double mean[kStep], m2[kStep];
    int rare = 0;
    extremes(known, least, most);
    for (int at = 0; at < kStep; ++at) {
        const double value = known.value[at], square = known.square[at];
        mean[at] = value * one_by_n;
        m2[at] = square - value * mean[at];
        rare |= !(value < huge) | !(value > -huge) | !(square < huge) | (value * mean[at] > kFarFromZero * m2[at]);
    }
    for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int i = place<T>(half, lane), at = half * kLanes + lane;
            out[i] = n;
            out[width + i] = mean[at];
            out[2 * width + i] = m2[at];
            out[3 * width + i] = least[at];
            out[4 * width + i] = most[at];
            out[5 * width + i] = known.size[at] * one_by_n;
        }
    }
    for (int i = 0; i < kStep; ++i) {
        out[6 * width + i] = known.nears[i];
        out[7 * width + i] = known.zeros[i];
    }
    if (rare) settle_step(x, stride, tokens, known, out, width);
}

// A chunk of tokens by `steps` steps of channels, channels next to each other; `scratch` has room for a Known per step.
// out: [8][width].
template <class T>
void moments_tokens(const T* x, std::int64_t stride, std::int64_t tokens, std::int64_t steps, const Limits& limits,
                    void* scratch, double* out, std::int64_t width) {
    Known<T>* known = static_cast<Known<T>*>(scratch);
    const Step<T> near = near_of<T>(limits);
    for (std::int64_t i = 0; i < steps; ++i) Known<T>::begin(known + i);
    std::int64_t t = 0;
    for (; t + kTogether <= tokens; t += kTogether) {
        for (std::int64_t i = 0; i < steps; ++i) {
            tokens_step<kTogether>(x + t * stride + i * kStep, stride, near, known + i);
        }
    }
    for (; t < tokens; ++t) {
        for (std::int64_t i = 0; i < steps; ++i) tokens_step<1>(x + t * stride + i * kStep, stride, near, known + i);
    }
    for (std::int64_t i = 0; i < steps; ++i) {
        finish_step(x + i * kStep, stride, tokens, known[i], out + i * kStep, width);
    }
}
