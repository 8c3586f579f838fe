// Inner loops of linear_shift for one instruction set, included by each_isa.h: those that multiply bfloat16.

namespace {  // names repeat between kernel files

#include "panels.simd.h"

#if PYSTEER_ISA_LEVEL >= 4

constexpr bool kMultiplies = true;
constexpr int kRows = 32;  // of the weight, at a time

// Tokens [first, first + 48) as a panel of pairs [width / 2][48].
inline void pack_some(const BFloat16* x, std::int64_t stride, std::int64_t count, std::int64_t width,
                      std::uint32_t* panel) {
    for (std::int64_t j = 0; j < kPanel; j += 16) {
        turn_over<kPanel>(count - j, width / 2, panel + j, [&](std::int64_t row, std::int64_t d, __mmask16 mask) {
            return _mm512_maskz_loadu_epi32(mask, x + (j + row) * stride + 2 * d);
        });
    }
}

#if PYSTEER_ISA_LEVEL == 5

// 32 rows of the weight, where they lie, by 16, 32 or 48 tokens: sums[row][48].
template <int kTiles>
inline void multiply_rows(const BFloat16* w, std::int64_t stride, const std::uint32_t* panel, std::int64_t width,
                          float* sums) {
    constexpr std::int64_t kRow = kPanel * 4;
    const BFloat16* high = w + 16 * stride;
    _tile_zero(0);
    _tile_zero(1);
    if (kTiles > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    if (kTiles > 2) {
        _tile_zero(4);
        _tile_zero(5);
    }
    for (std::int64_t d = 0; d < width / 2; d += 16) {
        const std::uint32_t* v = panel + d * kPanel;
        _tile_loadd(6, w + 2 * d, stride * 2);
        _tile_loadd(7, v, kRow);
        _tile_dpbf16ps(0, 6, 7);
        if (kTiles > 1) {
            _tile_loadd(7, v + 16, kRow);
            _tile_dpbf16ps(2, 6, 7);
        }
        if (kTiles > 2) {
            _tile_loadd(7, v + 32, kRow);
            _tile_dpbf16ps(4, 6, 7);
        }
        _tile_loadd(6, high + 2 * d, stride * 2);
        if (kTiles > 2) {
            _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(7, v + 16, kRow);
        }
        if (kTiles > 1) {
            _tile_dpbf16ps(3, 6, 7);
            _tile_loadd(7, v, kRow);
        }
        _tile_dpbf16ps(1, 6, 7);
    }
    _tile_stored(0, sums, kRow);
    _tile_stored(1, sums + 16 * kPanel, kRow);
    if (kTiles > 1) {
        _tile_stored(2, sums + 16, kRow);
        _tile_stored(3, sums + 16 * kPanel + 16, kRow);
    }
    if (kTiles > 2) {
        _tile_stored(4, sums + 32, kRow);
        _tile_stored(5, sums + 16 * kPanel + 32, kRow);
    }
}

#else

// The same without tiles: eight rows of the weight at a time, of which a pair of inputs multiplies that of all tokens.
template <int kTiles>
inline void multiply_rows(const BFloat16* w, std::int64_t stride, const std::uint32_t* panel, std::int64_t width,
                          float* sums) {
    for (int first = 0; first < kRows; first += 8) {
        __m512 sum[8][kTiles];
        for (int i = 0; i < 8; ++i) {
            for (int t = 0; t < kTiles; ++t) sum[i][t] = _mm512_setzero_ps();
        }
        const BFloat16* rows = w + first * stride;
        for (std::int64_t d = 0; d < width / 2; ++d) {
            __m512bh v[kTiles];
            for (int t = 0; t < kTiles; ++t) v[t] = (__m512bh)_mm512_loadu_si512(panel + d * kPanel + 16 * t);
            for (int i = 0; i < 8; ++i) {
                std::int32_t pair;
                std::memcpy(&pair, rows + i * stride + 2 * d, sizeof(pair));
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                for (int t = 0; t < kTiles; ++t) sum[i][t] = _mm512_dpbf16_ps(sum[i][t], both, v[t]);
            }
        }
        for (int i = 0; i < 8; ++i) {
            for (int t = 0; t < kTiles; ++t) _mm512_storeu_ps(sums + (first + i) * kPanel + 16 * t, sum[i][t]);
        }
    }
}

#endif

// 16 outputs of one token: the bias of the layer, the shift, one rounding.
inline void finish16(Vec n, const LinearShift& op, std::int64_t token, std::int64_t output, int count) {
    const __mmask16 mask = __mmask16((1u << count) - 1u);
    if (op.linear_bias) {
        const __m256i half = _mm256_maskz_loadu_epi16(mask, op.linear_bias + output);
        n = add(n, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
    }
    const Row& row = op.rows[token / op.tokens];
    const std::int64_t place = token % op.tokens;
    if (place >= row.start && place < row.end) {
        const std::int64_t bank = row.set * op.outputs + output;
        const Vec s = set1(row.strength), g = _mm512_maskz_loadu_ps(mask, op.gain + bank);
        const Vec b = _mm512_maskz_loadu_ps(mask, op.bias + bank);
        n = fma(fma(s, sub(g, set1(1.0f)), set1(1.0f)), n, mul(s, b));
    }
    _mm256_mask_storeu_epi16(op.y + token * op.outputs + output, mask, narrow(n, BFloat16{}));
}

// Outputs [first, first + 32) of the tokens [begin, end); spare: [32][width], for rows behind the last.
inline void rows_of_weight(const LinearShift& op, std::int64_t first, std::int64_t begin, std::int64_t end,
                           const std::uint32_t* panels, BFloat16* spare) {
    alignas(64) float sums[kRows * kPanel];
    const std::int64_t here = std::min<std::int64_t>(kRows, op.outputs - first);
    const BFloat16* w = op.weight + first * op.weight_stride;
    std::int64_t stride = op.weight_stride;
    if (here < kRows) {
        std::fill_n(spare, kRows * op.width, BFloat16{0});
        for (std::int64_t i = 0; i < here; ++i) std::copy_n(w + i * stride, op.width, spare + i * op.width);
        w = spare;
        stride = op.width;
    }
    for (std::int64_t t = begin; t < end; t += kPanel) {
        const std::int64_t count = std::min<std::int64_t>(kPanel, end - t);
        const std::uint32_t* panel = panels + t / kPanel * kPanel * (op.width / 2);
        if (count > 32) {
            multiply_rows<3>(w, stride, panel, op.width, sums);
        } else if (count > 16) {
            multiply_rows<2>(w, stride, panel, op.width, sums);
        } else {
            multiply_rows<1>(w, stride, panel, op.width, sums);
        }
        for (std::int64_t j = 0; j < count; j += 16) {
            for (std::int64_t i = 0; i < here; i += 16) {
                __m512i r[16];
                for (int k = 0; k < 16; ++k) r[k] = _mm512_loadu_si512(sums + (i + k) * kPanel + j);
                transpose(r);
                const int wide = int(std::min<std::int64_t>(16, here - i));
                for (std::int64_t k = 0; k < std::min<std::int64_t>(16, count - j); ++k) {
                    finish16(_mm512_castsi512_ps(r[k]), op, t + j + k, first + i, wide);
                }
            }
        }
    }
}

#else

constexpr bool kMultiplies = false;
inline void pack_some(const BFloat16*, std::int64_t, std::int64_t, std::int64_t, std::uint32_t*) {}
inline void rows_of_weight(const LinearShift&, std::int64_t, std::int64_t, std::int64_t, const std::uint32_t*,
                           BFloat16*) {}

#endif

inline bool multiplies() { return kMultiplies; }

}  // namespace
