// Inner loops of sae_encode for one instruction set, included by each_isa.h.

#include "panels.simd.h"

// The exact product, always summed in the same order whatever else is computed.
template <class W>
float dot_latent(const float* x, const W* w, std::int64_t width) {
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    std::int64_t d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
        for (int i = 0; i < 4; ++i) sum[i] = fma(load(x + d + i * kLanes), load(w + d + i * kLanes), sum[i]);
    }
    float parts[4], rest = 0.0f;
    sum4(sum[0], sum[1], sum[2], sum[3], parts);
    for (; d < width; ++d) rest = fma1(x[d], to_float(w[d]), rest);
    return (parts[0] + parts[1]) + (parts[2] + parts[3]) + rest;
}

#if PYSTEER_ISA_LEVEL >= 3

// The lanes of `mask` one after another at the end of the candidates.
inline void append(Candidates& mine, __mmask16 mask, Vec upper, Vec lower, std::int32_t first) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
    _mm512_storeu_ps(mine.upper + mine.count, _mm512_maskz_compress_ps(mask, upper));
    _mm512_storeu_ps(mine.lower + mine.count, _mm512_maskz_compress_ps(mask, lower));
    _mm512_storeu_si512(mine.index + mine.count, _mm512_maskz_compress_epi32(mask, index));
    mine.count += __builtin_popcount(mask);
}

inline __mmask16 lanes_below(std::int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1u); }

// One token against a panel, `sums` being the products; all comparisons let NaN through.
inline void collect(const float* sums, const PanelOf& panel, Candidates& mine) {
    const Vec limit = set1(mine.limit);
    for (int c = 0; c < kVectors; ++c) {
        const std::int64_t at = c * kLanes;
        if (at >= panel.count) return;
        const Vec a = _mm512_add_ps(load(sums + at), load(panel.bias + at));
        __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes_below(panel.count - at), a, limit, _CMP_NLE_UQ);
        if (panel.threshold) {
            mask = _mm512_mask_cmp_ps_mask(mask, a, load(panel.threshold + at), _CMP_GT_OQ);
        }
        if (mask) append(mine, mask, a, a, panel.first + std::int32_t(at));
    }
}

// The same where the products are known up to a margin.
inline void screen(const float* sums, const PanelOf& panel, const TokenNorm& norm, Candidates& mine) {
    const Vec limit = set1(mine.limit), kept = set1(norm.kept), error = set1(norm.error), ulp = set1(0x1p-21f);
    for (int c = 0; c < kVectors; ++c) {
        const std::int64_t at = c * kLanes;
        if (at >= panel.count) return;
        const Vec a = _mm512_add_ps(load(sums + at), load(panel.bias + at));
        const Vec margin = fma(error, load(panel.sizes + at), mul(kept, load(panel.errors + at)));
        const Vec all = fma(_mm512_abs_ps(a), ulp, margin), upper = _mm512_add_ps(a, all);
        __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes_below(panel.count - at), upper, limit, _CMP_NLT_UQ);
        if (panel.threshold) {
            mask = _mm512_mask_cmp_ps_mask(mask, upper, load(panel.threshold + at), _CMP_NLE_UQ);
        }
        if (!mask) continue;
        Vec lower = sub(a, all);
        if (panel.threshold) {  // counts only once it is certain to be above
            const __mmask16 above = _mm512_cmp_ps_mask(lower, load(panel.threshold + at), _CMP_GT_OQ);
            lower = _mm512_mask_blend_ps(above, set1(-__builtin_inff()), lower);
        }
        append(mine, mask, upper, lower, panel.first + std::int32_t(at));
    }
}

#else

inline void collect(const float* sums, const PanelOf& panel, Candidates& mine) {
    for (std::int64_t j = 0; j < panel.count; ++j) {
        const float a = sums[j] + panel.bias[j];
        if (a <= mine.limit || (panel.threshold && !(a > panel.threshold[j]))) continue;
        mine.upper[mine.count] = mine.lower[mine.count] = a;
        mine.index[mine.count++] = panel.first + std::int32_t(j);
    }
}

#endif

// Blocks [begin, end) of packed tokens against the panels of a tile.
inline void encode_blocks(const EncodeTile& tile, std::int64_t begin, std::int64_t end) {
    alignas(64) float sums[kBlock * kPanel];
    for (std::int64_t p = 0; p < tile.panels; ++p) {
        const PanelOf panel = tile.panel(p, kPanel);
        for (std::int64_t b = begin; b < end; ++b) {
            const std::int64_t first = b * kBlock, count = std::min<std::int64_t>(kBlock, tile.tokens - first);
#if PYSTEER_ISA_LEVEL == 4
            if (tile.pairs) {
                const std::int64_t pairs = (tile.width + 1) / 2;
                multiply(tile.pair_tokens + b * kBlock * pairs, tile.pair_panels + p * kPanel * pairs, tile.width,
                         sums);
            } else
#endif
            {
                multiply(tile.float_tokens + b * kBlock * tile.width, tile.float_panels + p * kPanel * tile.width,
                         tile.width, sums);
            }
            for (std::int64_t t = 0; t < count; ++t) {
                Candidates& mine = tile.candidates[first + t];
#if PYSTEER_ISA_LEVEL == 4
                if (tile.screening) {
                    screen(sums + t * kPanel, panel, tile.norms[first + t], mine);
                } else
#endif
                    collect(sums + t * kPanel, panel, mine);
                if (mine.count > tile.room) tile.shrink(mine);
            }
        }
    }
}

template <class T>
void pack_tokens(const T* const* tokens, std::int64_t stride, const float* pre_bias, const EncodeTile& tile,
                 std::int64_t b, float* floats, Scratch& scratch) {
    const std::int64_t first = b * kBlock, count = std::min<std::int64_t>(kBlock, tile.tokens - first);
    for (std::int64_t t = 0; t < count; ++t) {
        token_floats(tokens[first + t], stride, pre_bias, tile.width, floats + t * tile.width);
    }
#if PYSTEER_ISA_LEVEL == 4
    if (tile.pairs) {
        const std::int64_t pairs = (tile.width + 1) / 2;
        pack_block(floats, count, tile.width, tile.pair_tokens + b * kBlock * pairs, scratch.rounded, scratch.lost,
                   tile.share(), tile.norms + first);
        return;
    }
#else
    (void)scratch;
#endif
    pack_block(floats, count, tile.width, tile.float_tokens + b * kBlock * tile.width);
}

template <class W>
void pack_latents(const W* w, const LatentFrame& f, const EncodeTile& tile, std::int64_t p, Scratch& scratch) {
    const std::int64_t first = tile.first + p * kPanel;
#if PYSTEER_ISA_LEVEL == 4
    if (tile.pairs) {
        const std::int64_t pairs = (f.width + 1) / 2;
        pack_panel(w, f, first, tile.pair_panels + p * kPanel * pairs,
                   tile.screening ? tile.sizes + p * kPanel : nullptr, tile.errors + p * kPanel, scratch.rounded,
                   scratch.floats, scratch.lost);
        return;
    }
#else
    (void)scratch;
#endif
    pack_panel(w, f, first, tile.float_panels + p * kPanel * f.width);
}
