// How many latents come before an edited one, for the gate "topk"; part of sae_edit.simd.h, inside its namespaces.

#if PYSTEER_ISA_LEVEL >= 3
constexpr int kRankTile = 6;
#elif PYSTEER_ISA_LEVEL == 2
constexpr int kRankTile = 3;
#else
constexpr int kRankTile = 1;
#endif

inline bool comes_before(float other, std::int64_t index, float score, std::int32_t own) {
    return index != own && (other > score || (other == score && index < own));
}

// The products of kTokens tokens from `t` with up to four latents from `first`, as they are.
template <int kTokens, class W>
inline void rank_by_dots(const W* const* rows, std::int64_t first, std::int64_t count, const float* bias,
                         const RankedTokens& tokens, std::int64_t t, std::int32_t* before) {
    float found[kTokens * 4];
    dot_tile<kTokens, 4>(tokens.floats + t * tokens.width, tokens.width, rows, tokens.width, found);
    for (int j = 0; j < kTokens; ++j) {
        for (std::int64_t i = 0; i < count; ++i) {
            const float other = found[4 * j + i] + bias[first + i];
            for (std::int64_t at = (t + j) * tokens.edits; at < (t + j + 1) * tokens.edits; ++at) {
                before[at] += comes_before(other, first + i, tokens.scores[at], tokens.own[at]);
            }
        }
    }
}

// Adds to before[t, e] how many of the latents [begin, end) come before the edited one.
template <class W>
void rank_by_all_dots(const W* w, const LatentFrame& f, std::int64_t begin, std::int64_t end, const float* bias,
                      const RankedTokens& tokens, std::int32_t* before) {
    for (std::int64_t m = begin; m < end; m += 4) {
        const std::int64_t count = std::min<std::int64_t>(4, end - m);
        const W* rows[4];
        for (std::int64_t i = 0; i < 4; ++i) rows[i] = w + (m + std::min(i, count - 1)) * f.stride;
        std::int64_t t = 0;
        for (; t + kRankTile <= tokens.count; t += kRankTile) {
            rank_by_dots<kRankTile>(rows, m, count, bias, tokens, t, before);
        }
        for (; t < tokens.count; ++t) rank_by_dots<1>(rows, m, count, bias, tokens, t, before);
    }
}

// Between what the pre-activations of a token lie that are known up to a margin.
inline void bounds(const float* sums, const float* bias, std::int64_t lanes, const TokenNorm& norm,
                   const PanelMemory& memory, float* lower, float* upper) {
    for (std::int64_t j = 0; j < lanes; ++j) {
        const float a = sums[j] + bias[j];
        const float all = margin_of(a, norm, memory.sizes[j], memory.errors[j]) + 0x1p-110f;  // subnormals may be lost
        lower[j] = a - all;
        upper[j] = a + all;
    }
}

// Ranks one edit against a panel; latents that the bounds leave open are multiplied exactly. Returns how many these
// are.
template <class W>
inline std::int32_t rank_by_bounds(const float* lower, const float* upper, const W* w, const LatentFrame& f,
                                   std::int64_t first, std::int64_t lanes, const float* bias, const float* token,
                                   float score, std::int32_t own, std::int32_t* before) {
    std::int32_t sure = 0, possible = 0;
    for (std::int64_t j = 0; j < lanes; ++j) {
        sure += lower[j] > score;
        possible += !(upper[j] < score);
    }
    if (possible == 0) return 0;
    const std::int64_t self = own - first;
    if (self >= 0 && self < lanes) {
        sure -= lower[self] > score;
        possible -= !(upper[self] < score);
    }
    *before += sure;
    if (possible == sure) return 0;
    const W* rows[4];
    std::int64_t index[4];
    int count = 0;
    const auto settle = [&] {
        float found[4];
        for (int i = count; i < 4; ++i) rows[i] = rows[0];
        dot_tile<1, 4>(token, 0, rows, f.width, found);
        for (int i = 0; i < count; ++i) {
            *before += comes_before(found[i] + bias[index[i]], first + index[i], score, own);
        }
        count = 0;
    };
    for (std::int64_t j = 0; j < lanes; ++j) {
        if (upper[j] < score || lower[j] > score || j == self) continue;
        rows[count] = w + (first + j) * f.stride;
        index[count++] = j;
        if (count == 4) settle();
    }
    if (count) settle();
    return possible - sure;
}

// Adds to before[t, e] how many latents of a panel come before the edited one, and to doubts[t] how many of them had
// to be multiplied exactly. x: the tokens, packed.
template <class W>
void rank_panel(const W* w, const LatentFrame& f, std::int64_t first, const float* bias, const RankedTokens& tokens,
                const PackedTokens& x, const PanelMemory& memory, std::int32_t* before, std::int32_t* doubts) {
    alignas(64) float sums[kBlock * kPanel];
    float lower[kPanel], upper[kPanel];
    pack_latents(w, f, first, true, memory);
    const std::int64_t lanes = std::min<std::int64_t>(kPanel, f.latents - first);
    start_tiles();
    for (std::int64_t b = 0; b < ceil_div(x.count, kBlock); ++b) {
        multiply_block(x, b, memory, f.width, sums);
        const std::int64_t last = std::min((b + 1) * kBlock, x.count);
        for (std::int64_t t = b * kBlock; t < last; ++t) {
            bounds(sums + (t - b * kBlock) * kPanel, bias + first, lanes, x.norms[t], memory, lower, upper);
            for (std::int64_t at = t * tokens.edits; at < (t + 1) * tokens.edits; ++at) {
                doubts[t] +=
                    rank_by_bounds(lower, upper, w, f, first, lanes, bias + first, tokens.floats + t * tokens.width,
                                   tokens.scores[at], tokens.own[at], before + at);
            }
        }
    }
    finish_tiles();
}
