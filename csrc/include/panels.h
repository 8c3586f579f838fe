// Products of tokens with many latents, tile by tile on the CPU, for ops that look at x W' + b and never keep it.
//
// Tokens are packed in blocks and latents in panels, so that a micro kernel (panels.simd.h) holds a whole block x panel
// in registers. Two forms: floats, and pairs of bfloat16 with sums in fp32 (AVX512_BF16).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "dtype.h"
#include "element.h"

namespace pysteer {

// R rows of L tokens of D channels; strides in elements.
struct TokenFrame {
    std::int64_t rows, tokens, width, row_stride, token_stride, channel_stride;

    std::int64_t count() const { return rows * tokens; }
    std::int64_t offset(std::int64_t n) const { return n / tokens * row_stride + n % tokens * token_stride; }
};

// M latents of D channels each; strides in elements.
struct LatentFrame {
    std::int64_t latents, width, latent_stride, channel_stride;
};

// What rounding to bfloat16 can do to the products of a token is bounded by these lengths and those of the latent.
struct TokenNorm {
    float kept;   // length of the rounded token
    float error;  // length of what rounding took off, and a share for sums in fp32
};

// Memory aligned for the widest vectors; not initialised.
template <class T>
class Buffer {
 public:
    explicit Buffer(std::int64_t size = 0) {
        if (size == 0) return;
        const std::size_t bytes = (std::size_t(size) * sizeof(T) + 63) / 64 * 64;
        data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
        if (!data_) throw std::bad_alloc();
    }
    T* get() const { return data_.get(); }

 private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data_;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Tokens that are packed at once: few enough to bound the memory, enough to spread the packing of the weights over.
inline std::int64_t token_tile(std::int64_t tokens, std::int64_t width) {
    constexpr std::int64_t budget = 32 << 20;
    return std::min(tokens, std::clamp<std::int64_t>(budget / (8 * std::max<std::int64_t>(width, 1)), 64, 2048));
}

// Waking a thread costs some microseconds, which is some hundred thousand products.
inline int threads_for_products(std::int64_t products, std::int64_t available) {
    return int(std::clamp<std::int64_t>(products >> 18, 1, std::max<std::int64_t>(available, 1)));
}

}  // namespace pysteer
