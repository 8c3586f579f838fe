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

// How many elements are near zero, and how many are zero: per lane, so only of so many elements as a lane can count.
template <class T>
struct Counts {
    Step<T> nears, zeros;
    static Counts none() { return {Step<T>::all(0), Step<T>::all(0)}; }
    void take(Step<T> size, Step<T> near) {
        nears = nears.count(size, near);
        zeros = zeros.count(size, Step<T>::all(1));
    }
    void take(const Counts& b) {
        nears = nears.plus(b.nears);
        zeros = zeros.plus(b.zeros);
    }
};

template <class T>
inline Step<T> near_of(const Limits& limits) {
    return Step<T>::all(typename Step<T>::Bits(limits.near));
}

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

// What a block adds up to.
template <class T>
struct Totals {
    double value, square, size;
    typename Step<T>::Bits largest, highest, lowest;
    std::int64_t near, zero;

    Totals(const Sums& sums, const Order<T>& order, const Counts<T>& counts)
        : value(total(sums.value)),
          square(total(sums.square)),
          size(total(sums.size)),
          largest(order.largest.fold_largest()),
          highest(order.highest.fold_highest()),
          lowest(order.lowest.fold_lowest()),
          near(counts.nears.fold_sum()),
          zero(counts.zeros.fold_sum()) {}
};

// How many of them run side by side, so that no sum waits for itself and all stay in registers.
template <class T>
constexpr int kPairs = PYSTEER_ISA_LEVEL >= 4 && std::is_same<T, BFloat16>::value ? 2 : 1;

// What a step of elements of one channel adds up to; the order of the sums is free along a channel.
template <class T>
struct Pair {
    Sums a, b;
    Order<T> order;
    Counts<T> counts;

    static Pair empty() { return {no_sums(), no_sums(), Order<T>::empty(), Counts<T>::none()}; }
    void add(const Pair& other) {
        a.take(other.a);
        b.take(other.b);
        order.take(other.order);
        counts.take(other.counts);
    }
    void compare(Step<T> x) { order.take(x, x.sizes()); }
    void count(Step<T> x, Step<T> near) {
        const Step<T> size = x.sizes();
        Vec v, w, s, t;
        x.floats(v, w);
        size.floats(s, t);
        a.take(v, s);
        b.take(w, t);
        counts.take(size, near);
    }
    void take(Step<T> x, Step<T> near) {
        compare(x);
        count(x, near);
    }
    Totals<T> totals() const {
        Sums both = a;
        both.take(b);
        return {both, order, counts};
    }
};

// Both halves of a step in the same registers: AVX2 has sixteen, and what does not fit costs more than the sums.
template <>
struct Pair<float> {
    Vec value, square, other_square, size;
    Ints largest, highest, lowest, nears, zeros;

    static Pair empty() {
        return {zero(), zero(), zero(), zero(), all32(0x80000000u), all32(0), all32(0xffffffffu), all32(0), all32(0)};
    }
    void add(const Pair& from) {
        value = plus(value, from.value);
        square = plus(square, from.square);
        other_square = plus(other_square, from.other_square);
        size = plus(size, from.size);
        largest = max_s32(largest, from.largest);
        highest = max_u32(highest, from.highest);
        lowest = min_u32(lowest, from.lowest);
        nears = plus32(nears, from.nears);
        zeros = plus32(zeros, from.zeros);
    }
    void compare(Ints x) {
        largest = max_s32(largest, x);
        highest = max_u32(highest, x);
        lowest = min_u32(lowest, both_of(x, all32(0x7fffffffu)));
    }
    void compare(Step<float> x) {
        compare(x.v);
        compare(x.w);
    }
    void count(Ints x, Ints near, Vec* squares) {
        const Ints bits = both_of(x, all32(0x7fffffffu));
        const Vec v = as_floats(x);
        value = plus(value, v);
        *squares = fma(v, v, *squares);
        size = plus(size, as_floats(bits));
        nears = count_below32(nears, bits, near);
        zeros = count_zeros32(zeros, bits);
    }
    void count(Step<float> x, Step<float> near) {
        count(x.v, near.v, &square);
        count(x.w, near.w, &other_square);
    }
    void take(Step<float> x, Step<float> near) {  // one half after the other, so that few values live at a time
        compare(x.v);
        count(x.v, near.v, &square);
        compare(x.w);
        count(x.w, near.w, &other_square);
    }
    Totals<float> totals() const {
        const Ints none = all32(0), low = all32(0xffffffffu), deep = all32(0x80000000u);
        return {{value, plus(square, other_square), size},
                {{largest, deep}, {highest, none}, {lowest, low}},
                {{nears, none}, {zeros, none}}};
    }
};

#if PYSTEER_ISA_LEVEL >= 4
// Products of pairs, added up two at a time in one instruction.
inline __m512bh pairs(Ints v) { return __m512bh(v); }
template <>
struct Pair<BFloat16> {
    Sums a;
    Order<BFloat16> order;
    Counts<BFloat16> counts;

    static Pair empty() { return {no_sums(), Order<BFloat16>::empty(), Counts<BFloat16>::none()}; }
    void add(const Pair& other) {
        a.take(other.a);
        order.take(other.order);
        counts.take(other.counts);
    }
    void compare(Step<BFloat16> x) { order.take(x, x.sizes()); }
    void count(Step<BFloat16> x, Step<BFloat16> near) {
        const Step<BFloat16> size = x.sizes();
        const __m512bh one = pairs(all16(0x3f80));
        a.value = _mm512_dpbf16_ps(a.value, pairs(x.v), one);
        a.square = _mm512_dpbf16_ps(a.square, pairs(x.v), pairs(x.v));
        a.size = _mm512_dpbf16_ps(a.size, pairs(size.v), one);
        counts.take(size, near);
    }
    void take(Step<BFloat16> x, Step<BFloat16> near) {
        compare(x);
        count(x, near);
    }
    Totals<BFloat16> totals() const { return {a, order, counts}; }
};
#endif

template <class T>
inline float value_of(typename Step<T>::Bits bits) {
    T element;
    std::memcpy(&element, &bits, sizeof element);
    return to_float(element);
}

// Minimum, maximum and smallest size from the three integers.
template <class T>
inline void decode(typename Step<T>::Bits largest, typename Step<T>::Bits highest, typename Step<T>::Bits lowest,
                   float* minimum, float* maximum) {
    using Bits = typename Step<T>::Bits;
    constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
    const float smallest = value_of<T>(lowest);
    *maximum = largest & sign ? -smallest : value_of<T>(largest);
    *minimum = highest & sign ? value_of<T>(highest) : smallest;
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

// The elements behind the last whole step, filled up with zeros that are counted as well; out of the way of the loop
// over whole steps.
template <class T>
__attribute__((noinline)) void take_rest(const T* x, int rest, const Limits& limits, Pair<T>* acc) {
    T zeros[kStep], same[kStep];
    pad(x, rest, zeros, same);
    acc->count(Step<T>::read(zeros), near_of<T>(limits));
    acc->compare(Step<T>::read(same));
}

// Fetches the step one page further: by itself the processor stops at the end of every page, and a plane takes half as
// long again. What lies behind the last plane is fetched in vain, which harms nothing.
template <class T>
inline void fetch_ahead(const T* step) {
    constexpr std::int64_t page = 4096 / std::int64_t(sizeof(T)), line = 64 / std::int64_t(sizeof(T));
    for (std::int64_t d = 0; d < kStep; d += line) __builtin_prefetch(step + page + d);
}

// The whole steps of one row, in a function of its own: with more than that around the loop the compiler keeps sums in
// memory, which takes three times as long.
template <class T>
__attribute__((noinline)) void take_steps(const T* x, std::int64_t whole, Step<T> near, Pair<T>* sums) {
    Pair<T> acc[kPairs<T>];
    for (int i = 0; i < kPairs<T>; ++i) acc[i] = sums[i];
    std::int64_t t = 0;
    for (; t + kPairs<T> * kStep <= whole; t += kPairs<T> * kStep) {
        for (int i = 0; i < kPairs<T>; ++i) fetch_ahead(x + t + i * kStep);
        for (int i = 0; i < kPairs<T>; ++i) acc[i].take(Step<T>::read(x + t + i * kStep), near);
    }
    if (kPairs<T> > 1 && t < whole) acc[0].take(Step<T>::read(x + t), near);
    for (int i = 0; i < kPairs<T>; ++i) sums[i] = acc[i];
}

template <class T>
inline Totals<T> sum_plane(const T* x, const Block& block, const Limits& limits) {
    const Step<T> near = near_of<T>(limits);
    Pair<T> acc[kPairs<T>], last = Pair<T>::empty();
    for (Pair<T>& each : acc) each = Pair<T>::empty();
    const std::int64_t whole = block.tokens / kStep * kStep, rest = block.tokens - whole;
    for (std::int64_t r = 0; r < block.rows; ++r) {
        const T* row = x + r * block.row_stride;
        take_steps(row, whole, near, acc);
        if (rest) take_rest(row + whole, int(rest), limits, &last);
    }
    acc[0].add(last);
    for (int i = 1; i < kPairs<T>; ++i) acc[0].add(acc[i]);
    Totals<T> sums = acc[0].totals();
    const std::int64_t filled = rest ? block.rows * (kStep - rest) : 0;
    sums.near -= limits.near ? filled : 0;
    sums.zero -= filled;
    return sums;
}

// One channel of a block of rows, tokens next to each other.
template <class T>
void moments_plane(const T* x, const Block& block, const Limits& limits, ChannelBlock* out) {
    const Totals<T> sums = sum_plane(x, block, limits);
    decode<T>(sums.largest, sums.highest, sums.lowest, &out->minimum, &out->maximum);
    const double n = double(block.rows * block.tokens);
    if (!in_range(sums.value, sums.square)) {
        careful_sums(x, block, 0.0, out);
        if (out->mean - out->mean == 0) careful_sums(x, block, out->mean, out);
    } else if (!settled(sums.value, sums.square, sums.size, 1 / n, out)) {
        centred_plane(x, block, out);
    }
    out->near = double(sums.near);
    out->zero = double(sums.zero);
}

#include "channel_moments_tokens.simd.h"

inline std::int64_t moments_step() { return kStep; }
template <class T>
inline std::int64_t moments_scratch() {
    return sizeof(Known<T>);
}

// Moments of so many channels of two disjoint sets of values, [8][width] each: count, mean, m2, minimum, maximum, mean
// of sizes, near and zero counts. Those of `from` are added to those of `into`. No count of `from` is 0.
void moments_merge(const double* from, std::int64_t from_width, double* into, std::int64_t into_width,
                   std::int64_t channels) {
    const std::int64_t f = from_width, w = into_width;
    for (std::int64_t d = 0; d < channels; ++d) {
        const double n = from[d], all = into[d] + n, share_a = into[d] / all, share_b = n / all;
        const double difference = from[f + d] - into[w + d];
        const double least = from[3 * f + d], most = from[4 * f + d];
        into[2 * w + d] += from[2 * f + d] + difference * difference * (n * share_a);
        into[w + d] = into[w + d] * share_a + from[f + d] * share_b;
        into[3 * w + d] = (least < into[3 * w + d]) | (least != least) ? least : into[3 * w + d];
        into[4 * w + d] = (most > into[4 * w + d]) | (most != most) ? most : into[4 * w + d];
        into[5 * w + d] = into[5 * w + d] * share_a + from[5 * f + d] * share_b;
        into[6 * w + d] += from[6 * f + d];
        into[7 * w + d] += from[7 * f + d];
        into[d] = all;
    }
}

}  // namespace
