// Inner loops of sae_decode for one instruction set, included by each_isa.h.

#include "dot_tiles.h"

constexpr int kRows = 4;  // of the table at a time

template <class T>
inline void ask_for(const T* p, std::int64_t count) {
    const char* first = reinterpret_cast<const char*>(p);
    for (std::int64_t i = 0; i < count * std::int64_t(sizeof(T)); i += 64) __builtin_prefetch(first + i);
}

// Adds kCount weighted rows to the sums. The first rows start from the bias, the last add the residual and write y.
template <int kCount, class W, class Y>
inline void add_rows(const float* weights, const W* const* rows, const W* const* next, bool first, bool last,
                     std::int64_t width, const float* bias, const Y* residual, float* sums, Y* y) {
    Vec weight[kCount + 1];
    for (int i = 0; i < kCount; ++i) weight[i] = set1(weights[i]);
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
        if (next && (d * sizeof(W)) % 64 == 0) {
            for (int i = 0; i < kRows; ++i) __builtin_prefetch(next[i] + d);
        }
        Vec sum = !first ? load(sums + d) : bias ? load(bias + d) : zero();
        for (int i = 0; i < kCount; ++i) sum = fma(weight[i], load(rows[i] + d), sum);
        if (!last) {
            store(sums + d, sum);
        } else {
            store(y + d, residual ? fma(set1(1.0f), load(residual + d), sum) : sum);
        }
    }
    for (; d < width; ++d) {
        float sum = !first ? sums[d] : bias ? bias[d] : 0.0f;
        for (int i = 0; i < kCount; ++i) sum = fma1(weights[i], to_float(rows[i][d]), sum);
        if (!last) {
            sums[d] = sum;
        } else {
            y[d] = from_float<Y>(residual ? sum + to_float(residual[d]) : sum);
        }
    }
}

// y = bias + sum_i weights[i] table[index[i]] + residual, in this order; bias and residual may be null. Whole rows are
// read one after the other, four at a time, while the next four are asked for. sums: [width].
template <class W, class Y>
void sum_rows(const float* weights, const std::int32_t* index, int count, const W* table, std::int64_t stride,
              std::int64_t width, const float* bias, const Y* residual, float* sums, Y* y) {
    const W *rows[kRows] = {}, *next[kRows];
    int i = 0;
    do {
        const int now = std::min(kRows, count - i);
        const bool first = i == 0, last = i + now == count;
        for (int j = 0; j < now; ++j) rows[j] = table + index[i + j] * stride;
        for (int j = 0; j < kRows && !last; ++j) next[j] = table + index[std::min(i + kRows + j, count - 1)] * stride;
        const auto add = now == 4   ? add_rows<4, W, Y>
                         : now == 3 ? add_rows<3, W, Y>
                         : now == 2 ? add_rows<2, W, Y>
                         : now == 1 ? add_rows<1, W, Y>
                                    : add_rows<0, W, Y>;
        add(weights + i, rows, last ? nullptr : next, first, last, width, bias, residual, sums, y);
        i += kRows;
    } while (i < count);
}

// dots[i] = x · table[index[i]], 0 for a negative index. scratch: [width].
template <class X, class W>
void dot_rows(const X* x, const std::int32_t* index, int count, const W* table, std::int64_t stride, std::int64_t width,
              float* scratch, float* dots) {
    std::int64_t unused = 0;
    const float* token = as_floats(x, width, 1, width, scratch, &unused);
    for (int i = 0; i < count; i += 4) {
        const W* rows[4];
        for (int j = 0; j < 4; ++j) rows[j] = table + std::max(index[std::min(i + j, count - 1)], 0) * stride;
        for (int j = i + 4; j < std::min(i + 8, count); ++j) ask_for(table + std::max(index[j], 0) * stride, width);
        float four[4];
        dot_tile<1, 4>(token, width, rows, width, four);
        for (int j = i; j < std::min(i + 4, count); ++j) dots[j] = index[j] < 0 ? 0.0f : four[j - i];
    }
}
