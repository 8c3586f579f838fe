// Inner loops of linear_gate for one instruction set, included by each_isa.h.

namespace {  // other kernel files have sums and dot products of their own in this namespace

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
void sum_tokens(const T* x, std::int64_t stride, std::int64_t begin, std::int64_t end, const std::uint8_t* counted,
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
float sum_channel(const T* x, std::int64_t begin, std::int64_t end, const std::uint8_t* counted) {
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

inline float dot(const float* a, const float* b, std::int64_t width) {
    Vec sum = zero();
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
    float total = lanes_of(sum);
    for (; d < width; ++d) total = fma1(a[d], b[d], total);
    return total;
}

// The gate of a row with the mean v; spare: [width].
inline float gate_of(const float* v, const GateCall& g, float* spare) {
    const std::int64_t width = g.width;
    if (g.kind == kMinMax) {
        bool inside = true;
        for (std::int64_t d = 0; d < width; ++d) inside &= v[d] >= g.weight[d] && v[d] <= g.weight[width + d];
        return inside ? 1.0f : 0.0f;
    }
    if (g.kind == kOod) {
        for (std::int64_t d = 0; d < width; ++d) spare[d] = v[d] - g.weight[d];
        float square = dot(spare, spare, width);
        for (std::int64_t j = 0; j < g.rank; ++j) {
            const float along = dot(spare, g.factor + j * width, width);
            square -= along * along;
        }
        return (g.scale ? square * *g.scale : square) <= *g.bias ? 1.0f : 0.0f;
    }
    const float first = dot(v, g.weight, width) + g.bias[0];
    float rest = g.count == 1 ? std::exp(-first) : 0.0f;  // of the others, in units of the first
    for (std::int64_t c = 1; c < g.count; ++c)
        rest += std::exp(dot(v, g.weight + c * width, width) + g.bias[c] - first);
    const float probability = 1.0f / (1.0f + rest);
    return g.threshold < 0.0f ? probability : probability >= g.threshold ? 1.0f : 0.0f;
}

}  // namespace
