// Packing and the micro kernel of panels.h for one instruction set; included by kernel files, see each_isa.h.
//
//   kBlock tokens x kPanel latents of one step of the micro kernel
//   floats: tokens [width][kBlock], latents [width][kPanel]
//   pairs:  tokens [width / 2][kBlock] and latents [width / 2][kPanel] of two bfloat16 each, the last filled with zero;
//           for AMX tokens [kBlock][pair_depth] and latents [pair_depth][kPanel]

constexpr int kVectors = 3;  // of a panel
constexpr int kPanel = kVectors * kLanes;
#if PYSTEER_ISA_LEVEL == 5
constexpr int kBlock = 32;
#elif PYSTEER_ISA_LEVEL >= 3
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif
constexpr int kGroup = kBlock < 8 ? kBlock : 8;  // tokens whose sums are in registers
#if PYSTEER_ISA_LEVEL >= 4
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

inline std::int64_t block_size() { return kBlock; }
inline std::int64_t panel_size() { return kPanel; }
inline bool has_pairs() { return kHasPairs; }

// One token less the bias that is subtracted from all of them.
template <class T>
void token_floats(const T* x, std::int64_t stride, const float* pre_bias, std::int64_t width, float* out) {
    std::int64_t d = 0;
    if (stride == 1) {
        for (; d + kLanes <= width; d += kLanes) {
            const Vec v = load(x + d);
            store(out + d, pre_bias ? sub(v, load(pre_bias + d)) : v);
        }
    }
    for (; d < width; ++d) out[d] = to_float(x[d * stride]) - (pre_bias ? pre_bias[d] : 0.0f);
}

#if PYSTEER_ISA_LEVEL >= 3

// Turns 16 rows of 16 words over.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Up to 16 rows of `depth` words, of which `count` exist, into columns of what has kColumns of them. `words(row, d,
// mask)` reads 16 words.
template <int kColumns, class Words>
inline void turn_over(std::int64_t count, std::int64_t depth, void* to, const Words& words) {
    for (std::int64_t d = 0; d < depth; d += 16) {
        const std::int64_t here = std::min<std::int64_t>(16, depth - d);
        const __mmask16 mask = __mmask16((1u << here) - 1u);
        __m512i rows[16];
        for (int j = 0; j < 16; ++j) rows[j] = j < count ? words(j, d, mask) : _mm512_setzero_si512();
        transpose(rows);
        for (std::int64_t i = 0; i < here; ++i) {
            char* column = static_cast<char*>(to) + (d + i) * kColumns * 4;
            if constexpr (kColumns < 16) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(column), _mm512_castsi512_si256(rows[i]));
            } else {
                _mm512_storeu_si512(column, rows[i]);
            }
        }
    }
}

inline __m512i float_words(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, p); }
template <class W>
inline __m512i float_words(const W* p, __mmask16 mask) {
    if (mask == 0xffff) return _mm512_castps_si512(load(p));
    float values[kLanes] = {};
    for (int i = 0; i < kLanes && mask >> i; ++i) values[i] = to_float(p[i]);
    return _mm512_castps_si512(load(values));
}

// floats: [kBlock][width], `count` of them tokens.
inline void pack_block(const float* floats, std::int64_t count, std::int64_t width, float* block) {
    for (std::int64_t t = 0; t < kBlock; t += 16) {
        turn_over<kBlock>(count - t, width, block + t, [&](std::int64_t row, std::int64_t d, __mmask16 mask) {
            return float_words(floats + (t + row) * width + d, mask);
        });
    }
}

// Packs tokens where they lie, channels side by side, less a bias if there is one.
template <class T>
inline void pack_block_in_place(const T* const* tokens, std::int64_t count, const float* pre_bias, std::int64_t width,
                                float* block) {
    for (std::int64_t t = 0; t < kBlock; t += 16) {
        turn_over<kBlock>(count - t, width, block + t, [&](std::int64_t row, std::int64_t d, __mmask16 mask) {
            const __m512i words = float_words(tokens[t + row] + d, mask);
            if (!pre_bias) return words;
            return _mm512_castps_si512(sub(_mm512_castsi512_ps(words), _mm512_maskz_loadu_ps(mask, pre_bias + d)));
        });
    }
}

template <class W>
void pack_panel(const W* w, const LatentFrame& f, std::int64_t first, float* panel) {
    for (std::int64_t j = 0; j < kPanel; j += 16) {
        const W* rows = w + (first + j) * f.stride;
        turn_over<kPanel>(f.latents - first - j, f.width, panel + j,
                          [&](std::int64_t row, std::int64_t d, __mmask16 mask) {
                              return float_words(rows + row * f.stride + d, mask);
                          });
    }
}

#else

inline void pack_block(const float* floats, std::int64_t count, std::int64_t width, float* block) {
    for (std::int64_t t = 0; t < kBlock; ++t) {
        const float* from = floats + t * width;
        for (std::int64_t d = 0; d < width; ++d) block[d * kBlock + t] = t < count ? from[d] : 0.0f;
    }
}

template <class W>
void pack_panel(const W* w, const LatentFrame& f, std::int64_t first, float* panel) {
    const std::int64_t count = std::min<std::int64_t>(kPanel, f.latents - first);
    constexpr std::int64_t kStep = 32;  // channels at a time, so that the panel is written in the cache
    for (std::int64_t start = 0; start < f.width; start += kStep) {
        const std::int64_t end = std::min(start + kStep, f.width);
        for (std::int64_t j = 0; j < kPanel; ++j) {
            const W* from = w + (first + j) * f.stride;
            for (std::int64_t d = start; d < end; ++d) panel[d * kPanel + j] = j < count ? to_float(from[d]) : 0.0f;
        }
    }
}

#endif

template <class T>
inline float length(const T* v, std::int64_t n) {
    float lanes[kLanes];
    Vec sum = zero();
    std::int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
        const Vec value = load(v + d);
        sum = fma(value, value, sum);
    }
    store(lanes, sum);
    float total = 0.0f;
    for (; d < n; ++d) total = fma1(to_float(v[d]), to_float(v[d]), total);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    return __builtin_sqrtf(total);
}

// sums[t][0..kPanel) of kBlock tokens. Channels are taken some at a time, for all groups of tokens, while their part of
// the panel lies in the first cache; every sum is added up in the order of the channels all the same.
inline void multiply(const float* block, const float* panel, std::int64_t width, float* sums) {
    constexpr std::int64_t kDepth = 128;
    for (std::int64_t start = 0; start < width; start += kDepth) {
        const std::int64_t end = std::min(start + kDepth, width);
        for (int first = 0; first < kBlock; first += kGroup) {
            Vec sum[kGroup][kVectors];
            for (int t = 0; t < kGroup; ++t) {
                const float* kept = sums + (first + t) * kPanel;
                for (int c = 0; c < kVectors; ++c) sum[t][c] = start ? load(kept + c * kLanes) : zero();
            }
            for (std::int64_t d = start; d < end; ++d) {
                const Vec w0 = load(panel + d * kPanel), w1 = load(panel + d * kPanel + kLanes),
                          w2 = load(panel + d * kPanel + 2 * kLanes);
                for (int t = 0; t < kGroup; ++t) {
                    const Vec v = set1(block[d * kBlock + first + t]);
                    sum[t][0] = fma(v, w0, sum[t][0]);
                    sum[t][1] = fma(v, w1, sum[t][1]);
                    sum[t][2] = fma(v, w2, sum[t][2]);
                }
            }
            for (int t = 0; t < kGroup; ++t) {
                for (int c = 0; c < kVectors; ++c) store(sums + (first + t) * kPanel + c * kLanes, sum[t][c]);
            }
        }
    }
}

#if PYSTEER_ISA_LEVEL >= 4

inline std::uint32_t pair_at(const BFloat16* p) {
    std::uint32_t both;
    std::memcpy(&both, p, sizeof both);
    return both;
}

// A row rounded to bfloat16 and filled with a zero to an even length, its length and that of what rounding took off.
template <class T>
inline void round_row(const T* v, std::int64_t n, BFloat16* out, float* size, float* error) {
    Vec sum = zero(), off = zero();
    std::int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
        const Vec value = load(v + d);
        const __m256i half = narrow(value, BFloat16{});
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), half);
        const Vec lost = sub(value, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
        sum = fma(value, value, sum);
        off = fma(lost, lost, off);
    }
    float total = _mm512_reduce_add_ps(sum), total_off = _mm512_reduce_add_ps(off);
    for (; d < n; ++d) {
        const float value = to_float(v[d]);
        out[d] = from_float<BFloat16>(value);
        const float lost = value - to_float(out[d]);
        total = fma1(value, value, total);
        total_off = fma1(lost, lost, total_off);
    }
    out[n] = BFloat16{0};
    *size = __builtin_sqrtf(total);
    *error = __builtin_sqrtf(total_off);
}

// rounded: [width + 2]. `share` of the length of the token is added to what rounding took off.
inline void pack_block(const float* floats, std::int64_t count, std::int64_t width, std::uint32_t* block,
                       BFloat16* rounded, float share, TokenNorm* norms) {
    const std::int64_t pairs = (width + 1) / 2;
#if PYSTEER_ISA_LEVEL == 5
    std::memset(block, 0, kBlock * pair_depth(width) * sizeof(std::uint32_t));
#endif
    for (std::int64_t t = 0; t < kBlock; ++t) {
        if (t < count) {
            float size, error;
            round_row(floats + t * width, width, rounded, &size, &error);
            if (norms) norms[t] = {(size + error) * 1.001f, (error + share * size) * 1.001f};
        }
#if PYSTEER_ISA_LEVEL == 5
        if (t < count) std::memcpy(block + t * pair_depth(width), rounded, pairs * sizeof(std::uint32_t));
#else
        for (std::int64_t d = 0; d < pairs; ++d) block[d * kBlock + t] = t < count ? pair_at(rounded + 2 * d) : 0;
#endif
    }
}

// A latent as pairs: where it lies, or rounded. A latent that lies there gets its length only if `sized`.
inline const BFloat16* as_pairs(const BFloat16* w, std::int64_t width, bool sized, BFloat16* rounded, float* size,
                                float* error) {
    if (width % 2) {
        round_row(w, width, rounded, size, error);
        return rounded;
    }
    *size = sized ? length(w, width) : 0.0f;
    *error = 0.0f;
    return w;
}
template <class W>
inline const BFloat16* as_pairs(const W* w, std::int64_t width, bool, BFloat16* rounded, float* size, float* error) {
    round_row(w, width, rounded, size, error);
    return rounded;
}

// rounded: [kPanel][width + 2].
template <class W>
void pack_panel(const W* w, const LatentFrame& f, std::int64_t first, std::uint32_t* panel, bool sized, float* sizes,
                float* errors, BFloat16* rounded) {
    const std::int64_t count = std::min<std::int64_t>(kPanel, f.latents - first), pairs = (f.width + 1) / 2;
    const BFloat16* rows[kPanel];
    for (std::int64_t j = 0; j < count; ++j) {
        BFloat16* own = rounded + j * (f.width + 2);
        rows[j] = as_pairs(w + (first + j) * f.stride, f.width, sized, own, sizes + j, errors + j);
        sizes[j] *= 1.001f;
        errors[j] *= 1.001f;
    }
    for (std::int64_t j = 0; j < kPanel; j += 16) {
        turn_over<kPanel>(count - j, pairs, panel + j, [&](std::int64_t row, std::int64_t d, __mmask16 mask) {
            return _mm512_maskz_loadu_epi32(mask, rows[j + row] + 2 * d);
        });
    }
#if PYSTEER_ISA_LEVEL == 5
    std::memset(panel + pairs * kPanel, 0, (pair_depth(f.width) - pairs) * kPanel * sizeof(std::uint32_t));
#endif
}

#if PYSTEER_ISA_LEVEL == 5

struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// All eight tiles have 16 rows of 64 bytes. A thread does this before its first multiply.
inline void start_tiles() {
    TileShapes shapes;
    std::fill_n(shapes.bytes, 8, std::uint16_t(64));
    std::fill_n(shapes.rows, 8, std::uint8_t(16));
    __asm__ volatile("" : : "r"(&shapes) : "memory");  // gcc 12 believes that only the first bytes are read
    _tile_loadconfig(&shapes);
}
inline void finish_tiles() { _tile_release(); }

// Two tiles of tokens by three of latents; each load is used as often as eight tiles allow.
inline void multiply(const std::uint32_t* block, const std::uint32_t* panel, std::int64_t width, float* sums) {
    const std::int64_t depth = pair_depth(width), stride = depth * 4;
    const std::uint32_t *low = block, *high = block + 16 * depth;
    constexpr std::int64_t kRow = kPanel * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (std::int64_t d = 0; d < depth; d += 16) {
        const std::uint32_t* w = panel + d * kPanel;
        _tile_loadd(6, low + d, stride);
        _tile_loadd(7, w, kRow);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(7, w + 16, kRow);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(7, w + 32, kRow);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(6, high + d, stride);
        _tile_dpbf16ps(5, 6, 7);
        _tile_loadd(7, w + 16, kRow);
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, w, kRow);
        _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, sums, kRow);
    _tile_stored(1, sums + 16, kRow);
    _tile_stored(2, sums + 32, kRow);
    _tile_stored(3, sums + 16 * kPanel, kRow);
    _tile_stored(4, sums + 16 * kPanel + 16, kRow);
    _tile_stored(5, sums + 16 * kPanel + 32, kRow);
}

#else

inline void multiply(const std::uint32_t* block, const std::uint32_t* panel, std::int64_t width, float* sums) {
    Vec sum[kBlock][kVectors];
    for (int t = 0; t < kBlock; ++t) {
        for (int c = 0; c < kVectors; ++c) sum[t][c] = zero();
    }
    const std::int64_t pairs = (width + 1) / 2;
    for (std::int64_t d = 0; d < pairs; ++d) {
        const __m512bh w0 = __m512bh(_mm512_loadu_si512(panel + d * kPanel)),
                       w1 = __m512bh(_mm512_loadu_si512(panel + d * kPanel + kLanes)),
                       w2 = __m512bh(_mm512_loadu_si512(panel + d * kPanel + 2 * kLanes));
        for (int t = 0; t < kBlock; ++t) {
            const __m512bh v = __m512bh(_mm512_set1_epi32(int(block[d * kBlock + t])));
            sum[t][0] = _mm512_dpbf16_ps(sum[t][0], v, w0);
            sum[t][1] = _mm512_dpbf16_ps(sum[t][1], v, w1);
            sum[t][2] = _mm512_dpbf16_ps(sum[t][2], v, w2);
        }
    }
    for (int t = 0; t < kBlock; ++t) {
        for (int c = 0; c < kVectors; ++c) store(sums + t * kPanel + c * kLanes, sum[t][c]);
    }
}

#endif

#endif

#if PYSTEER_ISA_LEVEL < 5
inline void start_tiles() {}
inline void finish_tiles() {}
#endif

// Packs block b of the tokens, with what the margins need if `x.norms` is there. floats: [kBlock][width].
template <class T>
void pack_tokens(const T* const* tokens, std::int64_t stride, const float* pre_bias, std::int64_t width,
                 const PackedTokens& x, std::int64_t b, const PanelMemory& memory) {
    const std::int64_t first = b * kBlock, count = std::min<std::int64_t>(kBlock, x.count - first);
#if PYSTEER_ISA_LEVEL >= 3
    if (!x.pairs && !x.norms && stride == 1) {
        pack_block_in_place(tokens + first, count, pre_bias, width, x.floats + first * x.depth);
        return;
    }
#endif
    for (std::int64_t t = 0; t < count; ++t) {
        token_floats(tokens[first + t], stride, pre_bias, width, memory.floats + t * width);
    }
    const float share = float(width + 32) * 0x1p-22f;  // bounds twice the rounding of a sum of products
#if PYSTEER_ISA_LEVEL >= 4
    if (x.pairs) {
        pack_block(memory.floats, count, width, x.pairs + first * x.depth, memory.rounded, share,
                   x.norms ? x.norms + first : nullptr);
        return;
    }
#endif
    pack_block(memory.floats, count, width, x.floats + first * x.depth);
    for (std::int64_t t = 0; t < (x.norms ? count : 0); ++t) {
        const float size = length(memory.floats + t * width, width) * 1.001f;
        x.norms[first + t] = {size, share * size};
    }
}

// Packs a panel of latents, with the lengths that the margins need if `sized`.
template <class W>
void pack_latents(const W* w, const LatentFrame& f, std::int64_t first, bool sized, const PanelMemory& memory) {
#if PYSTEER_ISA_LEVEL >= 4
    if (memory.pairs) {
        pack_panel(w, f, first, memory.pairs, sized, memory.sizes, memory.errors, memory.rounded);
        return;
    }
#endif
    pack_panel(w, f, first, memory.panel);
    for (std::int64_t j = 0; j < (sized ? std::min<std::int64_t>(kPanel, f.latents - first) : 0); ++j) {
        memory.sizes[j] = length(w + (first + j) * f.stride, f.width) * 1.001f;
        memory.errors[j] = 0.0f;
    }
}

// How far a pre-activation `a` of a token, from packed products, may be from what exact products give.
inline float margin_of(float a, const TokenNorm& norm, float size, float error) {
    const float margin = norm.error * size + norm.kept * error;
    return __builtin_fabsf(a) * 0x1p-21f + margin;
}

inline void multiply_block(const PackedTokens& x, std::int64_t b, const PanelMemory& memory, std::int64_t width,
                           float* sums) {
#if PYSTEER_ISA_LEVEL >= 4
    if (x.pairs) {
        multiply(x.pairs + b * kBlock * x.depth, memory.pairs, width, sums);
        return;
    }
#endif
    multiply(x.floats + b * kBlock * x.depth, memory.panel, width, sums);
}
