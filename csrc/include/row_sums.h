// The means of the rows of an activation in one read. Include it after each_isa.h, with a kernel file that has
// row_sums.simd.h in it.
//
// The sums are split by row, by channels and by runs of tokens of a fixed size, so that the number of threads changes
// nothing in them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dtype.h"

namespace pysteer {
namespace {

constexpr std::int64_t kSummedChannels = 2048;  // of one piece of work
constexpr std::int64_t kSummedTokens = 512;

struct Sums {
    std::int64_t rows, tokens, width, x_row, x_token, x_channel;
    const std::int32_t* span;
    const std::uint8_t* mask;
    int threads;

    std::int64_t runs() const { return std::max<std::int64_t>((tokens + kSummedTokens - 1) / kSummedTokens, 1); }
    std::int64_t start(std::int64_t r) const { return span ? std::clamp<std::int64_t>(span[2 * r], 0, tokens) : 0; }
    std::int64_t end(std::int64_t r) const {
        return span ? std::clamp<std::int64_t>(span[2 * r + 1], start(r), tokens) : tokens;
    }
    std::int64_t counted(std::int64_t r) const {
        std::int64_t number = end(r) - start(r);
        if (mask) {
            number = 0;
            for (std::int64_t t = start(r); t < end(r); ++t) number += mask[r * tokens + t] != 0;
        }
        return number;
    }
};

// partials: [rows, runs, width]
template <class T>
void add_up(std::uintptr_t address, const Sums& s, std::vector<float>& partials) {
    const T* x = reinterpret_cast<const T*>(address);
    const std::int64_t runs = s.runs(), pieces = (s.width + kSummedChannels - 1) / kSummedChannels;
    const bool by_token = s.width == 1 || s.x_channel == 1;
    const auto tokens_of = PYSTEER_PICK(sum_row<T>);
    const auto channel_of = PYSTEER_PICK(sum_channel_of_row<T>);
#pragma omp parallel for num_threads(s.threads) schedule(dynamic) if (s.threads > 1)
    for (std::int64_t i = 0; i < s.rows * runs * pieces; ++i) {
        const std::int64_t r = i / (runs * pieces), run = i / pieces % runs, first = i % pieces * kSummedChannels;
        const std::int64_t width = std::min(kSummedChannels, s.width - first);
        const std::int64_t begin = std::max(run * kSummedTokens, s.start(r)),
                           end = std::min((run + 1) * kSummedTokens, s.end(r));
        const std::uint8_t* mask = s.mask ? s.mask + r * s.tokens : nullptr;
        float* sums = partials.data() + (r * runs + run) * s.width + first;
        const T* from = x + r * s.x_row + first * s.x_channel;
        if (by_token) {
            float partial[kSummedChannels];
            tokens_of(from, s.x_token, begin, end, mask, width, partial, sums);
        } else {
            for (std::int64_t d = 0; d < width; ++d) sums[d] = channel_of(from + d * s.x_channel, begin, end, mask);
        }
    }
}

// The means [rows, width] of the tokens that count, 0 where none does.
inline std::vector<float> means_of(std::uintptr_t x, DType type, const Sums& s) {
    const std::int64_t runs = s.runs();
    std::vector<float> sums(s.rows * runs * s.width), means(s.rows * s.width);
    if (type == DType::float32) add_up<float>(x, s, sums);
    if (type == DType::bfloat16) add_up<BFloat16>(x, s, sums);
    if (type == DType::float16) add_up<Float16>(x, s, sums);
    for (std::int64_t r = 0; r < s.rows; ++r) {
        const float number = float(std::max<std::int64_t>(s.counted(r), 1));
        const float* from = sums.data() + r * runs * s.width;
        float* mean = means.data() + r * s.width;
        for (std::int64_t run = 0; run < runs; ++run) {
            for (std::int64_t d = 0; d < s.width; ++d) mean[d] += from[run * s.width + d];
        }
        for (std::int64_t d = 0; d < s.width; ++d) mean[d] /= number;
    }
    return means;
}

}  // namespace
}  // namespace pysteer
