// Packing and the micro kernel of panels.h for one instruction set; included by kernel files, see each_isa.h.
//
//   kBlock tokens x kPanel latents of one step of the micro kernel
//   floats: tokens [width][kBlock], latents [width][kPanel]
//   pairs:  tokens [width / 2][kBlock] and latents [width / 2][kPanel] of two bfloat16 each, the last filled with zero

constexpr int kVectors = 3;  // of a panel
constexpr int kPanel = kVectors * kLanes;
#if PYSTEER_ISA_LEVEL >= 3
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif
#if PYSTEER_ISA_LEVEL == 4
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

// floats: [kBlock][width], `count` of them tokens.
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
            const W* from = w + (first + j) * f.latent_stride;
            for (std::int64_t d = start; d < end; ++d) {
                panel[d * kPanel + j] = j < count ? to_float(from[d * f.channel_stride]) : 0.0f;
            }
        }
    }
}

inline float length(const float* v, std::int64_t n) {
    float lanes[kLanes];
    Vec sum = zero();
    std::int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) sum = fma(load(v + d), load(v + d), sum);
    store(lanes, sum);
    float total = 0.0f;
    for (; d < n; ++d) total = fma1(v[d], v[d], total);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    return __builtin_sqrtf(total);
}

// sums[t][0..kPanel) of kBlock tokens.
inline void multiply(const float* block, const float* panel, std::int64_t width, float* sums) {
    Vec sum[kBlock][kVectors];
    for (int t = 0; t < kBlock; ++t) {
        for (int c = 0; c < kVectors; ++c) sum[t][c] = zero();
    }
    for (std::int64_t d = 0; d < width; ++d) {
        const Vec w0 = load(panel + d * kPanel), w1 = load(panel + d * kPanel + kLanes),
                  w2 = load(panel + d * kPanel + 2 * kLanes);
        for (int t = 0; t < kBlock; ++t) {
            const Vec v = set1(block[d * kBlock + t]);
            sum[t][0] = fma(v, w0, sum[t][0]);
            sum[t][1] = fma(v, w1, sum[t][1]);
            sum[t][2] = fma(v, w2, sum[t][2]);
        }
    }
    for (int t = 0; t < kBlock; ++t) {
        for (int c = 0; c < kVectors; ++c) store(sums + t * kPanel + c * kLanes, sum[t][c]);
    }
}

#if PYSTEER_ISA_LEVEL == 4

inline std::uint32_t pair_at(const BFloat16* p) {
    std::uint32_t both;
    std::memcpy(&both, p, sizeof both);
    return both;
}

// The floats rounded to bfloat16, what that leaves in `lost`; both are filled with zeros to an even length.
inline void round_floats(const float* v, std::int64_t n, BFloat16* out, float* lost) {
    std::int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
        const Vec value = load(v + d);
        store(out + d, value);
        store(lost + d, sub(value, load(out + d)));
    }
    for (; d < n; ++d) {
        out[d] = from_float<BFloat16>(v[d]);
        lost[d] = v[d] - to_float(out[d]);
    }
    out[n] = BFloat16{0};
}

// rounded: [width + 1]; lost: [width]. `share` of the length of the token is added to what rounding took off.
inline void pack_block(const float* floats, std::int64_t count, std::int64_t width, std::uint32_t* block,
                       BFloat16* rounded, float* lost, float share, TokenNorm* norms) {
    const std::int64_t pairs = (width + 1) / 2;
    for (std::int64_t t = 0; t < kBlock; ++t) {
        if (t >= count) {
            for (std::int64_t d = 0; d < pairs; ++d) block[d * kBlock + t] = 0;
            continue;
        }
        round_floats(floats + t * width, width, rounded, lost);
        for (std::int64_t d = 0; d < pairs; ++d) block[d * kBlock + t] = pair_at(rounded + 2 * d);
        const float size = length(floats + t * width, width), error = length(lost, width);
        norms[t] = {(size + error) * 1.001f, (error + share * size) * 1.001f};
    }
}

inline const BFloat16* as_pairs(const BFloat16* w, std::int64_t stride, std::int64_t width, BFloat16* rounded, float*,
                                float*) {
    if (stride == 1 && width % 2 == 0) return w;
    for (std::int64_t d = 0; d < width; ++d) rounded[d] = w[d * stride];
    rounded[width] = BFloat16{0};
    return rounded;
}
template <class W>
inline const BFloat16* as_pairs(const W* w, std::int64_t stride, std::int64_t width, BFloat16* rounded, float* floats,
                                float* lost) {
    token_floats(w, stride, nullptr, width, floats);
    round_floats(floats, width, rounded, lost);
    return rounded;
}

// The panel, and for every latent its length and the length of what rounding took off (skipped where `sizes` is null).
// floats, lost: [width]; rounded: [width + 1].
template <class W>
void pack_panel(const W* w, const LatentFrame& f, std::int64_t first, std::uint32_t* panel, float* sizes, float* errors,
                BFloat16* rounded, float* floats, float* lost) {
    const std::int64_t count = std::min<std::int64_t>(kPanel, f.latents - first), pairs = (f.width + 1) / 2;
    const BFloat16* rows[kPanel];
    for (std::int64_t j = 0; j < count; ++j) {
        BFloat16* mine = rounded + j * (f.width + 2);
        rows[j] = as_pairs(w + (first + j) * f.latent_stride, f.channel_stride, f.width, mine, floats, lost);
        if (!sizes) continue;
        constexpr bool exact = std::is_same<W, BFloat16>::value;
        if (exact) token_floats(w + (first + j) * f.latent_stride, f.channel_stride, nullptr, f.width, floats);
        sizes[j] = length(floats, f.width) * 1.001f;
        errors[j] = exact ? 0.0f : length(lost, f.width) * 1.001f;
    }
    constexpr std::int64_t kStep = 32;
    for (std::int64_t start = 0; start < pairs; start += kStep) {
        const std::int64_t end = std::min(start + kStep, pairs);
        for (std::int64_t j = 0; j < kPanel; ++j) {
            for (std::int64_t d = start; d < end; ++d) panel[d * kPanel + j] = j < count ? pair_at(rows[j] + 2 * d) : 0;
        }
    }
}

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
