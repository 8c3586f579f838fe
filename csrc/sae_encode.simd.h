// Inner loops of sae_encode for one instruction set, included by each_isa.h.

namespace {  // names repeat between kernel files

#include "dot_tiles.h"
#include "panels.simd.h"

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

// One token against a panel whose products are known up to a margin; all comparisons let NaN through.
inline void screen(const float* sums, const PanelOf& panel, const TokenNorm& norm, Candidates& mine) {
    const Vec limit = set1(mine.limit), kept = set1(norm.kept), error = set1(norm.error), ulp = set1(0x1p-21f);
    for (int c = 0; c < kVectors; ++c) {
        const std::int64_t at = c * kLanes;
        if (at >= panel.count) return;
        const Vec a = add(load(sums + at), load(panel.bias + at));
        const Vec margin = fma(error, load(panel.sizes + at), mul(kept, load(panel.errors + at)));
        const Vec all = fma(_mm512_abs_ps(a), ulp, margin), upper = add(a, all);
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

// The same for products that are exact.
inline void collect(const float* sums, const PanelOf& panel, Candidates& mine) {
    const Vec limit = set1(mine.limit);
    for (std::int64_t at = 0; at < panel.count; at += kLanes) {
        const Vec a = add(load(sums + at), load(panel.bias + at));
        __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes_below(panel.count - at), a, limit, _CMP_NLE_UQ);
        if (panel.threshold) mask = _mm512_mask_cmp_ps_mask(mask, a, load(panel.threshold + at), _CMP_GT_OQ);
        if (mask) append(mine, mask, a, a, panel.first + std::int32_t(at));
    }
}

#else

inline void append(Candidates& mine, float upper, float lower, std::int64_t index) {
    mine.upper[mine.count] = upper;
    mine.lower[mine.count] = lower;
    mine.index[mine.count++] = std::int32_t(index);
}

inline void screen(const float* sums, const PanelOf& panel, const TokenNorm& norm, Candidates& mine) {
    for (std::int64_t j = 0; j < panel.count; ++j) {
        const float a = sums[j] + panel.bias[j];
        const float all = margin_of(a, norm, panel.sizes[j], panel.errors[j]);
        if (a + all < mine.limit || (panel.threshold && a + all <= panel.threshold[j])) continue;
        const bool sure = !panel.threshold || a - all > panel.threshold[j];
        append(mine, a + all, sure ? a - all : -__builtin_inff(), panel.first + j);
    }
}

inline void collect(const float* sums, const PanelOf& panel, Candidates& mine) {
    for (std::int64_t j = 0; j < panel.count; ++j) {
        const float a = sums[j] + panel.bias[j];
        if (a <= mine.limit || (panel.threshold && !(a > panel.threshold[j]))) continue;
        append(mine, a, a, panel.first + j);
    }
}

#endif

// Blocks [begin, end) of packed tokens against a panel of latents, which is packed first.
template <class W>
void screen_panel(const W* w, const LatentFrame& f, std::int64_t first, const PackedTokens& x, std::int64_t begin,
                  std::int64_t end, const Selection& selection, const PanelMemory& memory, Candidates* candidates) {
    alignas(64) float sums[kBlock * kPanel];
    pack_latents(w, f, first, true, memory);
    PanelOf panel = selection.panel(first, kPanel);
    panel.sizes = memory.sizes;
    panel.errors = memory.errors;
    start_tiles();
    for (std::int64_t b = begin; b < end; ++b) {
        multiply_block(x, b, memory, f.width, sums);
        const std::int64_t token = b * kBlock, count = std::min<std::int64_t>(kBlock, x.count - token);
        for (std::int64_t t = 0; t < count; ++t) {
            Candidates& mine = candidates[token + t];
            screen(sums + t * kPanel, panel, x.norms[token + t], mine);
            if (mine.count > selection.room) selection.narrow_or_give_up(mine);
        }
    }
    finish_tiles();
}

#if PYSTEER_ISA_LEVEL >= 3
constexpr int kDotTokens = 6;
#elif PYSTEER_ISA_LEVEL == 2
constexpr int kDotTokens = 2;
#else
constexpr int kDotTokens = 2;
#endif
constexpr int kDotLatents = 48;  // at a time, so that they stay in the cache for all tokens

// x[t] for a few latents; every product is summed in the same order wherever it is computed.
template <int kTokens, class W>
void dots(const float* x, const W* const* w, std::int64_t count, std::int64_t width, float* sums) {
    for (std::int64_t j = 0; j < count; j += 4) {
        const W* four[4];
        for (int i = 0; i < 4; ++i) four[i] = w[std::min(j + i, count - 1)];
        float found[4 * kTokens];
        dot_tile<kTokens, 4>(x, width, four, width, found);
        for (int t = 0; t < kTokens; ++t) {
            for (int i = 0; i < 4; ++i) sums[t * kDotLatents + j + i] = found[4 * t + i];
        }
    }
}

template <class W>
void some_dots(const float* x, const W* const* w, std::int64_t count, std::int64_t width, float* sums) {
    dots<1>(x, w, count, width, sums);
}

// Tokens as floats [count][width] against latents [begin, end), all products exact.
template <class W>
void encode_dots(const float* x, std::int64_t count, const W* w, const LatentFrame& f, std::int64_t begin,
                 std::int64_t end, const Selection& selection, Candidates* candidates) {
    float sums[kDotTokens * kDotLatents];
    const W* rows[kDotLatents];
    for (std::int64_t first = begin; first < end; first += kDotLatents) {
        const PanelOf panel = selection.panel(first, std::min<std::int64_t>(kDotLatents, end - first));
        for (std::int64_t j = 0; j < panel.count; ++j) rows[j] = w + (first + j) * f.stride;
        const auto take = [&](std::int64_t token, std::int64_t tokens) {
            for (std::int64_t t = 0; t < tokens; ++t) {
                collect(sums + t * kDotLatents, panel, candidates[token + t]);
                if (candidates[token + t].count > selection.room) selection.cut_exact(candidates[token + t]);
            }
        };
        std::int64_t t = 0;
        for (; t + kDotTokens <= count; t += kDotTokens) {
            dots<kDotTokens>(x + t * f.width, rows, panel.count, f.width, sums);
            take(t, kDotTokens);
        }
        for (; t + 2 <= count; t += 2) {
            dots<2>(x + t * f.width, rows, panel.count, f.width, sums);
            take(t, 2);
        }
        for (; t < count; ++t) {
            dots<1>(x + t * f.width, rows, panel.count, f.width, sums);
            take(t, 1);
        }
    }
}

}  // namespace
