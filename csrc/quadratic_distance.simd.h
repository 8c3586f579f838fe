// Inner loops of quadratic_distance for one instruction set, included by each_isa.h.

namespace {  // other kernel files have sums of their own in this namespace

#include "dot_tiles.h"

inline float lanes_of(Vec v) {
    float four[4];
    sum4(v, zero(), zero(), zero(), four);
    return four[0];
}

// out[0..width) = x - middle; returns the sum of their squares.
template <class T>
float center_token(const T* x, const float* middle, float* out, std::int64_t width) {
    Vec a = zero(), b = zero();
    std::int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
        const Vec first = sub(load(x + d), load(middle + d));
        const Vec second = sub(load(x + d + kLanes), load(middle + d + kLanes));
        store(out + d, first);
        store(out + d + kLanes, second);
        a = fma(first, first, a);
        b = fma(second, second, b);
    }
    float total = lanes_of(add(a, b));
    for (; d < width; ++d) {
        out[d] = to_float(x[d]) - middle[d];
        total = fma1(out[d], out[d], total);
    }
    return total;
}

inline float square_sum(const float* z, std::int64_t rank) {
    Vec sum = zero();
    std::int64_t j = 0;
    for (; j + kLanes <= rank; j += kLanes) sum = fma(load(z + j), load(z + j), sum);
    float total = j > 0 ? lanes_of(sum) : 0.0f;
    for (; j < rank; ++j) total = fma1(z[j], z[j], total);
    return total;
}

// The first n floats of v, for n up to kLanes.
inline void store_first(float* out, Vec v, std::int64_t n) {
    if (n == kLanes) return store(out, v);
    float all[kLanes];
    store(all, v);
    std::copy(all, all + n, out);
}

// out[k] = max(0, c_k (square - 2 p_k + offset_k - |Z_k|²)); behind the products p come those with the directions,
// [rank], or [rank, count] where every centre has its own.
inline void join_token(const float* p, float square, const float* offset, const float* scale, bool scale_each,
                       float* out, std::int64_t count, std::int64_t rank, bool own) {
    const float* z = p + count;
    if (!own) square -= square_sum(z, rank);
    for (std::int64_t k = 0; k < count; k += kLanes) {
        const std::int64_t n = std::min<std::int64_t>(kLanes, count - k);
        Vec found = add(fma(set1(-2.0f), load_first(p + k, int(n)), load_first(offset + k, int(n))), set1(square));
        if (own) {
            Vec along = zero();
            for (std::int64_t j = 0; j < rank; ++j) {
                const Vec v = load_first(z + j * count + k, int(n));
                along = fma(v, v, along);
            }
            found = sub(found, along);
        }
        if (scale) found = mul(found, scale_each ? load_first(scale + k, int(n)) : set1(*scale));
        store_first(out + k, found, n);
    }
    for (std::int64_t k = 0; k < count; ++k) out[k] = out[k] < 0.0f ? 0.0f : out[k];  // NaN stays
}

// a . b
float product(const float* a, const float* b, std::int64_t width) {
    float found;
    dot_tile<1, 1>(a, 0, &b, width, &found);
    return found;
}

// w = m - Z'Z m for the directions Z [rank][width]. Returns m . w.
float apply_precision(const float* m, const float* z, std::int64_t rank, std::int64_t width, float* w) {
    std::copy(m, m + width, w);
    for (std::int64_t j = 0; j < rank; ++j) {
        const float* direction = z + j * width;
        const float along = -product(m, direction, width);
        std::int64_t d = 0;
        for (; d + kLanes <= width; d += kLanes) {
            store(w + d, fma(set1(along), load(direction + d), load(w + d)));
        }
        for (; d < width; ++d) w[d] = fma1(along, direction[d], w[d]);
    }
    return product(m, w, width);
}

}  // namespace
