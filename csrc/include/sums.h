// Sums over numbers that are next to each other, for kernel files that each_isa.h compiles: include it after simd.h,
// inside the namespace of the instruction set. No include guard. (No lambdas: they do not get the instruction set.)
//
// Long sums are taken in pieces, so that they stay exact, and always in the same order.

constexpr std::int64_t kPiece = 4096;

// Of x - mean, or of its squares.
template <class T, bool kSquares>
inline double sum_in_pieces(const T* x, std::int64_t count, float mean) {
    const Vec centre = set1(mean);
    double total = 0.0;
    while (count > 0) {
        const std::int64_t piece = std::min(count, kPiece);
        Vec sums[4] = {zero(), zero(), zero(), zero()};
        std::int64_t i = 0;
        for (; i + 4 * kLanes <= piece; i += 4 * kLanes) {
            Vec v[4];
            load2(x + i, v[0], v[1]);
            load2(x + i + 2 * kLanes, v[2], v[3]);
            for (int k = 0; k < 4; ++k) {
                v[k] = sub(v[k], centre);
                sums[k] = kSquares ? fma(v[k], v[k], sums[k]) : add(sums[k], v[k]);
            }
        }
        float parts[4];
        sum4(sums[0], sums[1], sums[2], sums[3], parts);
        float part = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        for (; i < piece; ++i) {
            const float v = to_float(x[i]) - mean;
            part = kSquares ? fma1(v, v, part) : part + v;
        }
        total += part;
        x += piece;
        count -= piece;
    }
    return total;
}

template <class T>
double sum_of(const T* x, std::int64_t count) {
    return sum_in_pieces<T, false>(x, count, 0.0f);
}

// Of (x - mean)².
template <class T>
double squares_of(const T* x, std::int64_t count, float mean) {
    return sum_in_pieces<T, true>(x, count, mean);
}
