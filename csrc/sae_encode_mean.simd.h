// Inner loops of sae_encode_mean for one instruction set, included by each_isa.h.

namespace {  // names repeat between kernel files

#include "dot_tiles.h"
#include "panels.simd.h"

// The packed tokens, which are tokens [start, start + x.count) of all rows of `tokens` each, against a panel of
// latents: what is active is added to `means` [rows][latents] in the order of the tokens.
template <class W>
void mean_panel(const W* w, const LatentFrame& f, std::int64_t first, const PackedTokens& x, std::int64_t start,
                std::int64_t tokens, const MeanOf& op, const PanelMemory& memory, float* means) {
    alignas(64) float sums[kBlock * kPanel];
    pack_latents(w, f, first, memory);
    const std::int64_t lanes = std::min<std::int64_t>(kPanel, f.latents - first);
    float bias[kPanel], limit[kPanel];
    for (std::int64_t j = 0; j < lanes; ++j) {
        bias[j] = op.bias[first + j];
        limit[j] = op.threshold ? op.threshold[first + j] : 0.0f;
        if (!op.folded) continue;
        const W* row = w + (first + j) * f.stride;
        float product;
        dot_tile<1, 1>(op.folded, 0, &row, f.width, &product);
        bias[j] -= product;
    }
    float* mean = means + start / tokens * f.latents + first;
    std::int64_t left = tokens - start % tokens;  // of the row
    start_tiles();
    for (std::int64_t b = 0; b < ceil_div(x.count, kBlock); ++b) {
        multiply_block(x, b, memory, f.width, sums);
        const std::int64_t token = b * kBlock, count = std::min<std::int64_t>(kBlock, x.count - token);
        for (std::int64_t t = 0; t < count; ++t) {
            const float* a = sums + t * kPanel;
            for (std::int64_t j = 0; j < lanes; ++j) {
                const float value = a[j] + bias[j];
                mean[j] += value <= limit[j] ? 0.0f : value;  // NaN stays
            }
            if (--left == 0) {
                mean += f.latents;
                left = tokens;
            }
        }
    }
    finish_tiles();
}

}  // namespace
