// Sums over the tokens of a row, for kernel files that each_isa.h compiles: include it after simd.h, inside the
// namespace of the instruction set. No include guard. Always in the same order, in runs that keep long sums exact.

constexpr std::int64_t kFlush = 64;  // tokens that are added up before their sum is added to the others

inline float lanes_of(Vec v) {
    float four[4];
    sum4(v, zero(), zero(), zero(), four);
    return four[0];
}

// sums[0..width) plus kTokens tokens.
template <int kTokens, class T>
inline void add_tokens(const T* const* token, std::int64_t width, float* sums) {
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
        Vec sum = load(token[0] + d);
        for (int t = 1; t < kTokens; ++t) sum = add(sum, load(token[t] + d));
        store(sums + d, add(load(sums + d), sum));
    }
    for (; d < width; ++d) {
        float sum = to_float(token[0][d]);
        for (int t = 1; t < kTokens; ++t) sum += to_float(token[t][d]);
        sums[d] += sum;
    }
}

// sums[0..width) of the tokens [begin, end) that count, channels next to each other. partial: [width].
template <class T>
void sum_row(const T* x, std::int64_t stride, std::int64_t begin, std::int64_t end, const std::uint8_t* counted,
             std::int64_t width, float* partial, float* sums) {
    std::fill(sums, sums + width, 0.0f);
    for (std::int64_t first = begin; first < end; first += kFlush) {
        std::fill(partial, partial + width, 0.0f);
        const T* tokens[kFlush];
        std::int64_t number = 0, t = 0;
        for (std::int64_t i = first; i < std::min(first + kFlush, end); ++i) {
            if (!counted || counted[i]) tokens[number++] = x + i * stride;
        }
        for (; t + 8 <= number; t += 8) add_tokens<8>(tokens + t, width, partial);
        for (; t < number; ++t) add_tokens<1>(tokens + t, width, partial);
        std::int64_t d = 0;
        for (; d + kLanes <= width; d += kLanes) store(sums + d, add(load(sums + d), load(partial + d)));
        for (; d < width; ++d) sums[d] += partial[d];
    }
}

// The sum of the tokens [begin, end) that count of one channel, tokens next to each other.
template <class T>
float sum_channel_of_row(const T* x, std::int64_t begin, std::int64_t end, const std::uint8_t* counted) {
    constexpr std::int64_t kRun = 16 * kFlush;
    float total = 0.0f;
    for (std::int64_t first = begin; first < end; first += kRun) {
        const std::int64_t last = std::min(first + kRun, end);
        float part = 0.0f;
        std::int64_t t = first;
        if (counted) {
            for (; t < last; ++t) part += counted[t] ? to_float(x[t]) : 0.0f;
        } else {
            Vec a = zero(), b = zero(), c = zero(), d = zero();
            for (; t + 4 * kLanes <= last; t += 4 * kLanes) {
                a = add(a, load(x + t));
                b = add(b, load(x + t + kLanes));
                c = add(c, load(x + t + 2 * kLanes));
                d = add(d, load(x + t + 3 * kLanes));
            }
            part = lanes_of(add(add(a, b), add(c, d)));
            for (; t < last; ++t) part += to_float(x[t]);
        }
        total += part;
    }
    return total;
}
