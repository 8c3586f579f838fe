// sae_encode_mean on the CPU: ReLU or JumpReLU of x W' + b, averaged over the tokens of a row without keeping them.

#include <atomic>
#include <vector>

#include "panels.h"
#include "registry.h"

namespace pysteer {
namespace {

struct MeanOf {
    const float *bias, *threshold;  // threshold null: ReLU
    const float* folded;            // subtracted from all tokens by way of the bias, or null
};

constexpr std::int64_t kMostPanels = 4;  // of latents that a thread has packed at once

}  // namespace
}  // namespace pysteer

#define PYSTEER_WITH_AMX
#define PYSTEER_KERNEL "sae_encode_mean.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

struct EncodeMean {
    TokenFrame tokens;
    LatentFrame latents;
    const float* pre_bias;
    MeanOf of;
    bool pairs;
    float* means;
    int threads;
};

// The first panel of every piece of work, and the end: as many at once as stay in a second cache next to a block of
// tokens, fewer towards the end, so that threads end together.
std::vector<std::int64_t> pieces_of(std::int64_t panels, const EncodeMean& op) {
    constexpr std::int64_t budget = 1 << 20;
    const std::int64_t most = budget / (kWidestPanel * op.latents.width * (op.pairs ? 2 : 4));
    std::vector<std::int64_t> starts = {0};
    while (starts.back() < panels) {
        const std::int64_t share = (panels - starts.back()) / (2 * op.threads);
        starts.push_back(starts.back() + std::clamp<std::int64_t>(std::min(most, share), 1, kMostPanels));
    }
    return starts;
}

// Adds tokens [start, start + count) to the means. A panel of latents belongs to one thread, so tokens are added in
// their order.
template <class T, class W>
void add_some(const EncodeMean& op, std::int64_t start, std::int64_t count, const T* x, const W* w,
              const TokenBuffers& buffers) {
    const std::int64_t block = PYSTEER_PICK(block_size)(), panel = PYSTEER_PICK(panel_size)();
    const std::vector<std::int64_t> starts = pieces_of(ceil_div(op.latents.latents, panel), op);
    const std::int64_t pieces = std::int64_t(starts.size()) - 1, most = pieces > 0 ? starts[1] : 0;
    PackedTokens packed = buffers.tokens(count);
    packed.norms = nullptr;  // no margins here
    std::vector<const T*> tokens(count);
    for (std::int64_t t = 0; t < count; ++t) tokens[t] = x + op.tokens.offset(start + t);
    std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        std::vector<PanelBuffers> own;
        std::vector<PanelMemory> memory;
        for (std::int64_t p = 0; p < most; ++p) {
            own.emplace_back(op.latents.width, op.pairs);
            memory.push_back(own.back().memory());
        }
#pragma omp for schedule(static)
        for (std::int64_t b = 0; b < ceil_div(count, block); ++b) {
            PYSTEER_PICK(pack_tokens<T>)
            (tokens.data(), op.tokens.channel_stride, op.pre_bias, op.latents.width, packed, b, memory[0]);
        }
        for (std::int64_t i = next++; i < pieces; i = next++) {
            PYSTEER_PICK(mean_panels<W>)
            (w, op.latents, starts[i] * panel, starts[i + 1] - starts[i], packed, start, op.tokens.tokens, op.of,
             memory.data(), op.means);
        }
    }
}

template <class T, class W>
void mean(EncodeMean op, const T* x, const W* w) {
    const bool exact = std::is_same<T, BFloat16>::value && std::is_same<W, BFloat16>::value;
    op.pairs = exact && PYSTEER_PICK(has_pairs)();
    if (op.pairs) std::swap(op.pre_bias, op.of.folded);  // so that the tokens need no rounding
    const std::int64_t count = op.tokens.count(), all = op.tokens.rows * op.latents.latents;
    const std::int64_t step = token_tile(count, op.latents.width);
    const TokenBuffers buffers(step, op.latents.width, op.pairs);
    std::fill_n(op.means, all, 0.0f);
    for (std::int64_t start = 0; start < count; start += step) {
        add_some(op, start, std::min(step, count - start), x, w, buffers);
    }
    for (std::int64_t i = 0; i < all; ++i) op.means[i] /= float(op.tokens.tokens);
}

template <class T>
void mean(const EncodeMean& op, const T* x, std::uintptr_t weight, DType type) {
    if (type == DType::float32) mean(op, x, reinterpret_cast<const float*>(weight));
    if (type == DType::bfloat16) mean(op, x, reinterpret_cast<const BFloat16*>(weight));
    if (type == DType::float16) mean(op, x, reinterpret_cast<const Float16*>(weight));
}

void sae_encode_mean(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t pre_bias,
                     std::uintptr_t threshold, std::uintptr_t means, std::int64_t rows, std::int64_t tokens,
                     std::int64_t width, std::int64_t x_row, std::int64_t x_token, std::int64_t x_channel,
                     std::int64_t latents, std::int64_t w_stride, std::int64_t x_type, std::int64_t w_type,
                     std::int64_t threads) {
    const py::gil_scoped_release release;
    EncodeMean op;
    op.tokens = {rows, tokens, width, x_row, x_token, x_channel};
    op.latents = {latents, width, w_stride};
    op.pre_bias = reinterpret_cast<const float*>(pre_bias);
    op.of = {reinterpret_cast<const float*>(bias), reinterpret_cast<const float*>(threshold), nullptr};
    op.pairs = false;
    op.means = reinterpret_cast<float*>(means);
    op.threads = threads_for_products(rows * tokens * latents * width, threads);
    const DType type = DType(w_type);
    if (DType(x_type) == DType::float32) mean(op, reinterpret_cast<const float*>(x), weight, type);
    if (DType(x_type) == DType::bfloat16) mean(op, reinterpret_cast<const BFloat16*>(x), weight, type);
    if (DType(x_type) == DType::float16) mean(op, reinterpret_cast<const Float16*>(x), weight, type);
}

void register_sae_encode_mean(py::module_& m) {
    m.def("sae_encode_mean", &sae_encode_mean, "Mean activations of all latents over the tokens of a row, on the CPU.");
}

PYSTEER_REGISTER_OP(register_sae_encode_mean)

}  // namespace
}  // namespace pysteer
