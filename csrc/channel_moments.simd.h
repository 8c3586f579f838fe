// Inner loops of channel_moments for one instruction set, included by each_isa.h.
//
// A step is 2 kLanes elements. Minimum, maximum and smallest size are found among the bits as integers, which order
// IEEE numbers of one sign by size: the largest signed integer is the maximum if any number is positive, the largest
// unsigned one is the minimum if any is negative, otherwise the smallest size gives them; NaN is beyond infinity.

namespace {

#include "bits.simd.h"

// Largest signed, largest unsigned integer and smallest size.
template <class T>
struct Order {
    Step<T> largest, highest, lowest;
    static Order empty() {
        using Bits = typename Step<T>::Bits;
        return {Step<T>::all(Bits(Bits(1) << (8 * sizeof(Bits) - 1))), Step<T>::all(0), Step<T>::all(Bits(~Bits(0)))};
    }
    void take(Step<T> x, Step<T> size) {
        largest = largest.largest(x);
        highest = highest.highest(x);
        lowest = lowest.lowest(size);
    }
    void take(const Order& b) {
        largest = largest.largest(b.largest);
        highest = highest.highest(b.highest);
        lowest = lowest.lowest(b.lowest);
    }
};

// Sums of the values, of their squares and of their sizes.
struct Sums {
    Vec value, square, size;
    void take(const Sums& other) {
        value = plus(value, other.value);
        square = plus(square, other.square);
        size = plus(size, other.size);
    }
    void take(Vec v, Vec s) {
        value = plus(value, v);
        square = fma(v, v, square);
        size = plus(size, s);
    }
};

inline Sums no_sums() { return {zero(), zero(), zero()}; }

// How many pairs of sums run side by side, so that no sum waits for itself and all stay in registers.
template <class T>
constexpr int kPairs = PYSTEER_ISA_LEVEL == 4 && std::is_same<T, BFloat16>::value ? 2 : 1;

template <class T>
struct Pair {
    Sums a, b;
    Order<T> order;

    void take(const Pair& other) {
        a.take(other.a);
        b.take(other.b);
        order.take(other.order);
    }

    static Pair empty() { return {no_sums(), no_sums(), Order<T>::empty()}; }
    void take(Step<T> x) {
        const Step<T> size = x.sizes();
        Vec v, w, s, t;
        x.floats(v, w);
        size.floats(s, t);
        a.take(v, s);
        b.take(w, t);
        order.take(x, size);
    }
};

#if PYSTEER_ISA_LEVEL == 4
// Products of pairs, added up two at a time in one instruction; the order of the sum is free along a channel.
inline __m512bh pairs(Ints v) { return __m512bh(v); }
template <>
struct Pair<BFloat16> {
    Sums a, b;
    Order<BFloat16> order;

    void take(const Pair& other) {
        a.take(other.a);
        order.take(other.order);
    }

    static Pair empty() { return {no_sums(), no_sums(), Order<BFloat16>::empty()}; }
    void take(Step<BFloat16> x) {
        const Step<BFloat16> size = x.sizes();
        const __m512bh one = pairs(all16(0x3f80));
        a.value = _mm512_dpbf16_ps(a.value, pairs(x.v), one);
        a.square = _mm512_dpbf16_ps(a.square, pairs(x.v), pairs(x.v));
        a.size = _mm512_dpbf16_ps(a.size, pairs(size.v), one);
        order.take(x, size);
    }
};
#endif

inline float total(Vec v) {
#if PYSTEER_ISA_LEVEL >= 3
    return _mm512_reduce_add_ps(v);
#elif PYSTEER_ISA_LEVEL == 2
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return v;
#endif
}

template <class T>
inline float value_of(typename Step<T>::Bits bits) {
    T element;
    std::memcpy(&element, &bits, sizeof element);
    return to_float(element);
}

// Minimum, maximum and smallest size from the three integers.
template <class T>
inline void decode(typename Step<T>::Bits largest, typename Step<T>::Bits highest, typename Step<T>::Bits lowest,
                   float* minimum, float* maximum, float* smallest) {
    using Bits = typename Step<T>::Bits;
    constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
    *smallest = value_of<T>(lowest);
    *maximum = largest & sign ? -*smallest : value_of<T>(largest);
    *minimum = highest & sign ? value_of<T>(highest) : *smallest;
    if (!(*maximum == *maximum) || !(*minimum == *minimum)) *minimum = *maximum = __builtin_nanf("");
}

// The elements of a plane that do not fill a step, zeros behind them, and behind them the last of them.
template <class T>
inline void pad(const T* x, int count, T* zeros, T* same) {
    std::memset(zeros, 0, kStep * sizeof(T));
    std::memcpy(zeros, x, count * sizeof(T));
    for (int i = 0; i < kStep; ++i) same[i] = x[std::min(i, count - 1)];
}

// Sum and sum of squares around a centre, in double: for what fp32 cannot hold.
template <class T>
inline void careful_sums(const T* x, const Block& block, double centre, ChannelBlock* out) {
    double value = 0, square = 0, size = 0;
    for (std::int64_t r = 0; r < block.rows; ++r) {
        for (std::int64_t t = 0; t < block.tokens; ++t) {
            const double v = to_float(x[r * block.row_stride + t * block.token_stride]);
            value += v - centre;
            square += (v - centre) * (v - centre);
            size += v < 0 ? -v : v;
        }
    }
    const double n = double(block.rows * block.tokens), shift = value / n;
    out->mean = centre + shift;
    out->m2 = square - value * shift;
    out->mean_abs = size / n;
}

// Deviations from the centre, for one channel whose tokens lie next to each other.
template <class T>
inline void centred_plane(const T* x, const Block& block, ChannelBlock* out) {
    const float centre = float(out->mean);
    const Vec c = set1(centre);
    Vec value[4] = {zero(), zero(), zero(), zero()}, square[4] = {zero(), zero(), zero(), zero()};
    double rest_value = 0, rest_square = 0;
    for (std::int64_t r = 0; r < block.rows; ++r) {
        const T* row = x + r * block.row_stride;
        std::int64_t t = 0;
        for (; t + 2 * kStep <= block.tokens; t += 2 * kStep) {
            Vec v[4];
            load2(row + t, v[0], v[1]);
            load2(row + t + kStep, v[2], v[3]);
            for (int i = 0; i < 4; ++i) {
                v[i] = sub(v[i], c);
                value[i] = plus(value[i], v[i]);
                square[i] = fma(v[i], v[i], square[i]);
            }
        }
        for (; t < block.tokens; ++t) {
            const double d = to_float(row[t]) - centre;
            rest_value += d;
            rest_square += d * d;
        }
    }
    const double n = double(block.rows * block.tokens);
    const double sum = total(plus(plus(value[0], value[1]), plus(value[2], value[3]))) + rest_value;
    const double sums = total(plus(plus(square[0], square[1]), plus(square[2], square[3]))) + rest_square;
    out->mean = double(centre) + sum / n;
    out->m2 = sums - sum * sum / n;
}

template <class T>
inline void count_plane(const T* x, const Block& block, const Limits& limits, ChannelBlock* out) {
    using Bits = typename Step<T>::Bits;
    const Step<T> near = Step<T>::all(Bits(limits.near)), one = Step<T>::all(1);
    Step<T> nears = Step<T>::all(0), zeros = Step<T>::all(0);
    std::int64_t near_rest = 0, zero_rest = 0;
    for (std::int64_t r = 0; r < block.rows; ++r) {
        const T* row = x + r * block.row_stride;
        std::int64_t t = 0;
        for (; t + kStep <= block.tokens; t += kStep) {
            const Step<T> size = Step<T>::read(row + t).sizes();
            nears = nears.count(size, near);
            zeros = zeros.count(size, one);
        }
        for (; t < block.tokens; ++t) {
            Bits bits;
            std::memcpy(&bits, row + t, sizeof bits);
            bits = Bits(bits & Bits(~Bits(0)) >> 1);
            near_rest += bits < Bits(limits.near);
            zero_rest += bits == 0;
        }
    }
    Bits lanes[2][kStep];
    nears.write(lanes[0]);
    zeros.write(lanes[1]);
    for (int i = 0; i < kStep; ++i) {
        near_rest += lanes[0][i];
        zero_rest += lanes[1][i];
    }
    out->near = double(near_rest);
    out->zero = double(zero_rest);
}

// What follows from the sums of a block: mean and m2 if they are safe, otherwise once more with more care.
inline bool settled(double value, double square, double size, double one_by_n, ChannelBlock* out) {
    out->mean = value * one_by_n;
    out->mean_abs = size * one_by_n;
    out->m2 = square - value * out->mean;
    return !(value * out->mean > kFarFromZero * out->m2);
}
inline bool in_range(double value, double square) {
    constexpr double huge = __builtin_huge_val();
    return value < huge && value > -huge && square < huge;
}

// What a block adds up to.
template <class T>
struct Totals {
    double value, square, size;
    typename Step<T>::Bits largest, highest, lowest;
};

// The elements behind the last whole step; out of the way of the loop over whole steps.
template <class T>
__attribute__((noinline)) void take_rest(const T* x, int rest, Pair<T>* acc) {
    T zeros[kStep], same[kStep];
    pad(x, rest, zeros, same);
    const Order<T> order = acc->order;
    acc->take(Step<T>::read(zeros));
    acc->order = order;
    acc->order.take(Step<T>::read(same), Step<T>::read(same).sizes());
}

template <class T>
inline Totals<T> sum_plane(const T* x, const Block& block) {
    Pair<T> acc[kPairs<T>], last = Pair<T>::empty();
    for (Pair<T>& each : acc) each = Pair<T>::empty();
    const std::int64_t whole = block.tokens / kStep * kStep, rest = block.tokens - whole;
    for (std::int64_t r = 0; r < block.rows; ++r) {
        const T* row = x + r * block.row_stride;
        std::int64_t t = 0;
#pragma GCC unroll 2
        for (; t + kPairs<T> * kStep <= whole; t += kPairs<T> * kStep) {
            for (int i = 0; i < kPairs<T>; ++i) acc[i].take(Step<T>::read(row + t + i * kStep));
        }
        if (kPairs<T> > 1 && t < whole) acc[0].take(Step<T>::read(row + t));
        if (rest) take_rest(row + whole, int(rest), &last);
    }
    acc[0].take(last);
    for (int i = 1; i < kPairs<T>; ++i) acc[0].take(acc[i]);
    return {total(plus(acc[0].a.value, acc[0].b.value)), total(plus(acc[0].a.square, acc[0].b.square)),
            total(plus(acc[0].a.size, acc[0].b.size)),   acc[0].order.largest.fold_largest(),
            acc[0].order.highest.fold_highest(),         acc[0].order.lowest.fold_lowest()};
}

// One channel of a block of rows, tokens next to each other.
template <class T>
void moments_plane(const T* x, const Block& block, const Limits& limits, ChannelBlock* out) {
    using Bits = typename Step<T>::Bits;
    const Totals<T> sums = sum_plane(x, block);
    decode<T>(sums.largest, sums.highest, sums.lowest, &out->minimum, &out->maximum, &out->smallest);
    const double n = double(block.rows * block.tokens);
    if (!in_range(sums.value, sums.square)) {
        careful_sums(x, block, 0.0, out);
        if (out->mean - out->mean == 0) careful_sums(x, block, out->mean, out);
    } else if (!settled(sums.value, sums.square, sums.size, 1 / n, out)) {
        centred_plane(x, block, out);
    }
    out->near = out->zero = 0;
    if (sums.lowest == 0 || sums.lowest < Bits(limits.near)) count_plane(x, block, limits, out);
}

constexpr int kTogether = 8;  // tokens that share the reading and writing of the sums

// kTokens tokens of one step of channels, added to the sums in memory: [6][kStep] floats of a.value, b.value, a.square,
// b.square, a.size, b.size, and [3][kStep] integers of Order.
template <class T, int kTokens>
inline void tokens_step(const T* x, std::int64_t stride, float* sums, typename Step<T>::Bits* order) {
    Order<T> seen{Step<T>::read(order), Step<T>::read(order + kStep), Step<T>::read(order + 2 * kStep)};
    Sums a{zero(), load(sums + 2 * kLanes), zero()}, b{zero(), load(sums + 3 * kLanes), zero()};
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
    }
    store(sums, plus(load(sums), a.value));
    store(sums + kLanes, plus(load(sums + kLanes), b.value));
    store(sums + 2 * kLanes, a.square);
    store(sums + 3 * kLanes, b.square);
    store(sums + 4 * kLanes, plus(load(sums + 4 * kLanes), a.size));
    store(sums + 5 * kLanes, plus(load(sums + 5 * kLanes), b.size));
    seen.largest.write(order);
    seen.highest.write(order + kStep);
    seen.lowest.write(order + 2 * kStep);
}

// Sums around the centres and counts of one step of channels, where one of its channels asks for them.
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

template <class T>
inline void count_step(const T* x, std::int64_t stride, std::int64_t tokens, const Limits& limits, ChannelBlock* out) {
    using Bits = typename Step<T>::Bits;
    const Step<T> near = Step<T>::all(Bits(limits.near)), one = Step<T>::all(1);
    Step<T> nears = Step<T>::all(0), zeros = Step<T>::all(0);
    for (std::int64_t t = 0; t < tokens; ++t) {
        const Step<T> size = Step<T>::read(x + t * stride).sizes();
        nears = nears.count(size, near);
        zeros = zeros.count(size, one);
    }
    Bits lanes[2][kStep];
    nears.write(lanes[0]);
    zeros.write(lanes[1]);
    for (int i = 0; i < kStep; ++i) {
        out[i].near = lanes[0][i];
        out[i].zero = lanes[1][i];
    }
}

// From the sums of one step of channels to the statistics of each.
template <class T>
inline void finish_step(const T* x, std::int64_t stride, std::int64_t tokens, const Limits& limits, const float* sums,
                        const typename Step<T>::Bits* order, ChannelBlock* out) {
    using Bits = typename Step<T>::Bits;
    const double n = double(tokens), one_by_n = 1 / n;
    bool unsettled = false, counts = false;
    float centres[kStep];
    for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int i = place<T>(half, lane), at = half * kLanes + lane;
            const double value = sums[at], square = sums[2 * kLanes + at], size = sums[4 * kLanes + at];
            if (!in_range(value, square)) {
                const Block block{1, tokens, 0, stride};
                careful_sums(x + i, block, 0.0, out + i);
                if (out[i].mean - out[i].mean == 0) careful_sums(x + i, block, out[i].mean, out + i);
                out[i].settled = true;
            } else {
                out[i].settled = settled(value, square, size, one_by_n, out + i);
                unsettled |= !out[i].settled;
            }
            centres[at] = float(out[i].mean);
        }
    }
    for (int i = 0; i < kStep; ++i) {
        const Bits lowest = order[2 * kStep + i];
        decode<T>(order[i], order[kStep + i], lowest, &out[i].minimum, &out[i].maximum, &out[i].smallest);
        counts |= lowest == 0 || lowest < Bits(limits.near);
        out[i].near = out[i].zero = 0;
    }
    if (counts) count_step(x, stride, tokens, limits, out);
    if (!unsettled) return;
    float again[4 * kLanes];
    centred_step(x, stride, tokens, centres, again);
    for (int half = 0; half < 2; ++half) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int i = place<T>(half, lane), at = half * kLanes + lane;
            if (out[i].settled) continue;
            const double value = again[at], square = again[2 * kLanes + at];
            out[i].mean = double(centres[at]) + value / n;
            out[i].m2 = square - value * value / n;
        }
    }
}

// A chunk of tokens by `steps` steps of channels, channels next to each other. sums: [steps][6][kLanes] floats, order:
// [steps][3][kStep] integers, both scratch; out: [steps][kStep].
template <class T>
void moments_tokens(const T* x, std::int64_t stride, std::int64_t tokens, std::int64_t steps, const Limits& limits,
                    void* sums_scratch, void* order_scratch, ChannelBlock* out) {
    using Bits = typename Step<T>::Bits;
    float* sums = static_cast<float*>(sums_scratch);
    Bits* order = static_cast<Bits*>(order_scratch);
    const Order<T> empty = Order<T>::empty();
    for (std::int64_t i = 0; i < steps; ++i) {
        for (int k = 0; k < 6; ++k) store(sums + (i * 6 + k) * kLanes, zero());
        empty.largest.write(order + i * 3 * kStep);
        empty.highest.write(order + i * 3 * kStep + kStep);
        empty.lowest.write(order + i * 3 * kStep + 2 * kStep);
    }
    std::int64_t t = 0;
    for (; t + kTogether <= tokens; t += kTogether) {
        for (std::int64_t i = 0; i < steps; ++i) {
            tokens_step<T, kTogether>(x + t * stride + i * kStep, stride, sums + i * 6 * kLanes, order + i * 3 * kStep);
        }
    }
    for (; t < tokens; ++t) {
        for (std::int64_t i = 0; i < steps; ++i) {
            tokens_step<T, 1>(x + t * stride + i * kStep, stride, sums + i * 6 * kLanes, order + i * 3 * kStep);
        }
    }
    for (std::int64_t i = 0; i < steps; ++i) {
        finish_step(x + i * kStep, stride, tokens, limits, sums + i * 6 * kLanes, order + i * 3 * kStep,
                    out + i * kStep);
    }
}

inline std::int64_t moments_step() { return kStep; }

}  // namespace
