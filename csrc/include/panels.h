// Products of tokens with many latents, tile by tile on the CPU, for ops that look at x W' + b and never keep it.
//
// Tokens are packed in blocks and latents in panels, so that a micro kernel (panels.simd.h) holds a whole block x panel
// in registers. Two forms: floats, and pairs of bfloat16 with sums in fp32 (AVX512_BF16, or the tiles of AMX).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "dtype.h"
#include "element.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pysteer {

// R rows of L tokens of D channels; strides in elements.
struct TokenFrame {
    std::int64_t rows, tokens, width, row_stride, token_stride, channel_stride;

    std::int64_t count() const { return rows * tokens; }
    std::int64_t offset(std::int64_t n) const { return n / tokens * row_stride + n % tokens * token_stride; }
};

// M latents of D channels next to each other; the stride is in elements.
struct LatentFrame {
    std::int64_t latents, width, stride;
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

// Tokens as the micro kernel wants them: floats, or pairs of bfloat16.
struct PackedTokens {
    std::int64_t count, depth;
    float* floats;
    std::uint32_t* pairs;
    TokenNorm* norms;
};

// What one thread packs into.
struct PanelMemory {
    float *panel, *sizes, *errors, *floats;
    std::uint32_t* pairs;
    BFloat16* rounded;
};

constexpr std::int64_t kWidestPanel = 48, kWidestBlock = 32;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Pairs of a row, filled up to what a tile of AMX takes.
inline std::int64_t pair_depth(std::int64_t width) { return ceil_div(width, 32) * 16; }

// The memory behind `PackedTokens`.
struct TokenBuffers {
    Buffer<float> floats;
    Buffer<std::uint32_t> pairs;
    Buffer<TokenNorm> norms;
    std::int64_t depth;

    TokenBuffers(std::int64_t count, std::int64_t width, bool in_pairs) : depth(in_pairs ? pair_depth(width) : width) {
        const std::int64_t size = ceil_div(count, kWidestBlock) * kWidestBlock;
        if (in_pairs) {
            pairs = Buffer<std::uint32_t>(size * depth);
        } else {
            floats = Buffer<float>(size * depth);
        }
        norms = Buffer<TokenNorm>(size);
    }

    PackedTokens tokens(std::int64_t count) const { return {count, depth, floats.get(), pairs.get(), norms.get()}; }
};

// The memory behind `PanelMemory`.
struct PanelBuffers {
    Buffer<float> panel, sizes, floats;
    Buffer<std::uint32_t> pairs;
    Buffer<BFloat16> rounded;

    PanelBuffers(std::int64_t width, bool in_pairs) : sizes(2 * kWidestPanel), floats(kWidestBlock * width) {
        if (in_pairs) {
            pairs = Buffer<std::uint32_t>(pair_depth(width) * kWidestPanel);
            rounded = Buffer<BFloat16>(kWidestPanel * (width + 2));
        } else {
            panel = Buffer<float>(width * kWidestPanel);
        }
    }

    PanelMemory memory() const {
        return {panel.get(), sizes.get(), sizes.get() + kWidestPanel, floats.get(), pairs.get(), rounded.get()};
    }
};

// Tokens that are packed at once: few enough to bound the memory, enough to spread the packing of the weights over.
inline std::int64_t token_tile(std::int64_t tokens, std::int64_t width) {
    constexpr std::int64_t budget = 32 << 20;
    return std::min(tokens, std::clamp<std::int64_t>(budget / (8 * std::max<std::int64_t>(width, 1)), 64, 1024));
}

// Who calls, inside a parallel region.
struct Team {
    std::int64_t size = 1, me = 0;

    Team() {
#ifdef _OPENMP
        size = omp_get_num_threads();
        me = omp_get_thread_num();
#endif
    }
};

// Waking a thread costs some microseconds, which is some hundred thousand products.
inline int threads_for_products(std::int64_t products, std::int64_t available) {
    return int(std::clamp<std::int64_t>(products >> 18, 1, std::max<std::int64_t>(available, 1)));
}

}  // namespace pysteer
