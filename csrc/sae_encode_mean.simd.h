// Inner loops of sae_encode_mean for one instruction set, included by each_isa.h.

namespace {  // names repeat between kernel files

#include "dot_tiles.h"
#include "panels.simd.h"

// A panel of latents that tokens are multiplied with, and what is added to their products.
struct PanelOfMeans {
    PanelMemory memory;
    float bias[kPanel], limit[kPanel];
    std::int64_t first, lanes;
};

template <class W>
void prepare_panel(const W* w, const LatentFrame& f, std::int64_t first, const MeanOf& op, PanelOfMeans& panel) {
    pack_latents(w, f, first, false, panel.memory);
    panel.first = first;
    panel.lanes = std::min<std::int64_t>(kPanel, f.latents - first);
    for (std::int64_t j = 0; j < panel.lanes; ++j) {
        panel.bias[j] = op.bias[first + j];
        panel.limit[j] = op.threshold ? op.threshold[first + j] : 0.0f;
        if (!op.folded) continue;
        const W* row = w + (first + j) * f.stride;
        float product;
        dot_tile<1, 1>(op.folded, 0, &row, f.width, &product);
        panel.bias[j] -= product;
    }
}

// Adds what is active of the products of `count` tokens from token `token` of row `row` on.
inline void add_active(const float* sums, std::int64_t count, const PanelOfMeans& panel, std::int64_t row,
                       std::int64_t token, std::int64_t tokens, const LatentFrame& f, float* means) {
    const float *const bias = panel.bias, *const limit = panel.limit;
    const std::int64_t lanes = panel.lanes;
    float* mean = means + row * f.latents + panel.first;
    for (std::int64_t t = 0; t < count; ++t) {
        const float* a = sums + t * kPanel;
#pragma GCC ivdep
        for (std::int64_t j = 0; j < lanes; ++j) {
            const float value = a[j] + bias[j];
            mean[j] += value <= limit[j] ? 0.0f : value;  // NaN stays
        }
        if (++token == tokens) {
            mean += f.latents;
            token = 0;
        }
    }
}

// The packed tokens, which are tokens [start, start + x.count) of all rows of `tokens` each, against `count` panels of
// latents from latent `first` on: what is active is added to `means` [rows][latents] in the order of the tokens. A
// block of tokens serves all panels while it lies in the cache.
template <class W>
void mean_panels(const W* w, const LatentFrame& f, std::int64_t first, std::int64_t count, const PackedTokens& x,
                 std::int64_t start, std::int64_t tokens, const MeanOf& op, const PanelMemory* memory, float* means) {
    alignas(64) float sums[kBlock * kPanel];
    PanelOfMeans panels[kMostPanels];
    for (std::int64_t p = 0; p < count; ++p) {
        panels[p].memory = memory[p];
        prepare_panel(w, f, first + p * kPanel, op, panels[p]);
    }
    start_tiles();
    for (std::int64_t b = 0; b < ceil_div(x.count, kBlock); ++b) {
        const std::int64_t token = b * kBlock, number = std::min<std::int64_t>(kBlock, x.count - token);
        for (std::int64_t p = 0; p < count; ++p) {
            multiply_block(x, b, panels[p].memory, f.width, sums);
            add_active(sums, number, panels[p], (start + token) / tokens, (start + token) % tokens, tokens, f, means);
        }
    }
    finish_tiles();
}

}  // namespace
