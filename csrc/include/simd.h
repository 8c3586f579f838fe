// Vectors of floats for one instruction set. each_isa.h includes this file once per set, inside a namespace of that
// set, with PYSTEER_ISA_LEVEL 0 (plain C++), 2 (AVX2, FMA, F16C), 3 (AVX-512 F, BW, VL, DQ), 4 (and BF16) or 5 (and
// AMX). No include guard.
//
//   kLanes                          floats in a Vec
//   load(p), store(p, v)            of float, BFloat16, Float16; store rounds once, to nearest even
//   load_first(p, n)                the first n floats, zeros behind them
//   load2(p, a, b)                  2 kLanes elements in the order that is cheapest for their type
//   load2_as(T{}, p, a, b)          2 kLanes floats in the order that load2 has for T
//   put2<T, kStream>(p, a, b)       2 kLanes elements in that order; kStream: past the caches, p aligned to the bytes
//   sum4(a, b, c, d, out)           the sums of the lanes of four vectors
//   within(v, low, high)            a Mask: where low < v < high
//   put2_where<T, kStream>(p, from, m, n, a, b)   as put2 where m and n say so, elsewhere the bits that are at `from`

#if PYSTEER_ISA_LEVEL >= 3

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float a) { return _mm512_set1_ps(a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p); }

#if PYSTEER_ISA_LEVEL >= 4
// The instruction flushes subnormal results (below 1.2e-38) to zero.
inline __m256i narrow(Vec v, BFloat16) { return __m256i(_mm512_cvtneps_pbh(v)); }
#else
// Bits rounded to the upper halves; NaN stays NaN.
inline __m512i rounded(Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
}
inline __m256i narrow(Vec v, BFloat16) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(v), 16)); }
#endif
inline __m256i narrow(Vec v, Float16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
template <class T>
inline void store(T* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}

// The order of BFloat16 pairs is even elements, odd elements: widening is then a shift and a mask.
inline void load2(const BFloat16* p, Vec& a, Vec& b) {
    const __m512i both = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
}
inline void load2_as(BFloat16, const float* p, Vec& a, Vec& b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Vec low = load(p), high = load(p + kLanes);
    a = _mm512_permutex2var_ps(low, even, high);
    b = _mm512_permutex2var_ps(low, _mm512_or_si512(even, _mm512_set1_epi32(1)), high);
}
inline __m512i join2(BFloat16, Vec a, Vec b) {
#if PYSTEER_ISA_LEVEL >= 4
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, __m512i(_mm512_cvtne2ps_pbh(b, a)));
#else
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded(a), 16), rounded(b));
#endif
}
inline __m512i join2(Float16, Vec a, Vec b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a, Float16{})), narrow(b, Float16{}), 1);
}
template <class T, bool kStream>
inline void put2(T* p, Vec a, Vec b) {
    const __m512i both = join2(T{}, a, b);
    if (kStream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    } else {
        _mm512_storeu_si512(p, both);
    }
}
template <>
inline void put2<float, false>(float* p, Vec a, Vec b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + kLanes, b);
}
template <>
inline void put2<float, true>(float* p, Vec a, Vec b) {
    _mm512_stream_ps(p, a);
    _mm512_stream_ps(p + kLanes, b);
}

inline __m256 fold(Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

using Mask = __mmask16;
inline Mask within(Vec v, Vec low, Vec high) {
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, low, _CMP_GT_OQ), v, high, _CMP_LT_OQ);
}
inline __m512i choose2(BFloat16, Mask m, Mask n, __m512i both, __m512i old) {
    const __m512i pick =
        _mm512_or_si512(_mm512_maskz_set1_epi32(m, 0xffff), _mm512_maskz_set1_epi32(n, int(0xffff0000)));
    return _mm512_ternarylogic_epi32(pick, both, old, 0xca);
}
inline __m512i choose2(Float16, Mask m, Mask n, __m512i both, __m512i old) {
    return _mm512_mask_mov_epi16(old, __mmask32(m) | __mmask32(n) << 16, both);
}
template <class T, bool kStream>
inline void put2_where(T* p, const T* from, Mask m, Mask n, Vec a, Vec b) {
    const __m512i both = choose2(T{}, m, n, join2(T{}, a, b), _mm512_loadu_si512(from));
    if (kStream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    } else {
        _mm512_storeu_si512(p, both);
    }
}
template <>
inline void put2_where<float, false>(float* p, const float* from, Mask m, Mask n, Vec a, Vec b) {
    put2<float, false>(p, _mm512_mask_mov_ps(load(from), m, a), _mm512_mask_mov_ps(load(from + kLanes), n, b));
}
template <>
inline void put2_where<float, true>(float* p, const float* from, Mask m, Mask n, Vec a, Vec b) {
    put2<float, true>(p, _mm512_mask_mov_ps(load(from), m, a), _mm512_mask_mov_ps(load(from + kLanes), n, b));
}

#elif PYSTEER_ISA_LEVEL == 2

using Vec = __m256;
constexpr int kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float a) { return _mm256_set1_ps(a); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load_first(const float* p, int n) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_maskload_ps(p, mask);
}

inline __m256i rounded(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
}
inline __m128i narrow(Vec v, BFloat16) {
    const __m256i high = _mm256_srli_epi32(rounded(v), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(Vec v, Float16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
template <class T>
inline void store(T* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
}

inline void load2(const BFloat16* p, Vec& a, Vec& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
}
inline void load2_as(BFloat16, const float* p, Vec& a, Vec& b) {
    const Vec low = _mm256_permute2f128_ps(load(p), load(p + kLanes), 0x20);
    const Vec high = _mm256_permute2f128_ps(load(p), load(p + kLanes), 0x31);
    a = _mm256_shuffle_ps(low, high, 0x88);
    b = _mm256_shuffle_ps(low, high, 0xdd);
}
inline __m256i join2(BFloat16, Vec a, Vec b) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded(a), 16), rounded(b), 0xaa);
}
inline __m256i join2(Float16, Vec a, Vec b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(narrow(a, Float16{})), narrow(b, Float16{}), 1);
}
template <class T, bool kStream>
inline void put2(T* p, Vec a, Vec b) {
    const __m256i both = join2(T{}, a, b);
    if (kStream) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), both);
    } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
    }
}
template <>
inline void put2<float, false>(float* p, Vec a, Vec b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + kLanes, b);
}
template <>
inline void put2<float, true>(float* p, Vec a, Vec b) {
    _mm256_stream_ps(p, a);
    _mm256_stream_ps(p + kLanes, b);
}

inline __m256 fold(Vec v) { return v; }

using Mask = __m256;
inline Mask within(Vec v, Vec low, Vec high) {
    return _mm256_and_ps(_mm256_cmp_ps(v, low, _CMP_GT_OQ), _mm256_cmp_ps(v, high, _CMP_LT_OQ));
}
inline __m256i choose2(BFloat16, Mask m, Mask n, __m256i both, __m256i old) {
    const __m256i pick = _mm256_blend_epi16(_mm256_castps_si256(m), _mm256_castps_si256(n), 0xaa);
    return _mm256_blendv_epi8(old, both, pick);
}
inline __m256i choose2(Float16, Mask m, Mask n, __m256i both, __m256i old) {
    const __m256i pairs = _mm256_packs_epi32(_mm256_castps_si256(m), _mm256_castps_si256(n));
    return _mm256_blendv_epi8(old, both, _mm256_permute4x64_epi64(pairs, 0xd8));
}
template <class T, bool kStream>
inline void put2_where(T* p, const T* from, Mask m, Mask n, Vec a, Vec b) {
    const __m256i old = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i both = choose2(T{}, m, n, join2(T{}, a, b), old);
    if (kStream) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), both);
    } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
    }
}
template <>
inline void put2_where<float, false>(float* p, const float* from, Mask m, Mask n, Vec a, Vec b) {
    put2<float, false>(p, _mm256_blendv_ps(load(from), a, m), _mm256_blendv_ps(load(from + kLanes), b, n));
}
template <>
inline void put2_where<float, true>(float* p, const float* from, Mask m, Mask n, Vec a, Vec b) {
    put2<float, true>(p, _mm256_blendv_ps(load(from), a, m), _mm256_blendv_ps(load(from + kLanes), b, n));
}

#else

using Vec = float;
constexpr int kLanes = 1;

inline Vec zero() { return 0.0f; }
inline Vec set1(float a) { return a; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
template <class T>
inline Vec load(const T* p) {
    return to_float(*p);
}
inline Vec load_first(const float* p, int n) { return n > 0 ? *p : 0.0f; }
template <class T>
inline void store(T* p, Vec v) {
    *p = from_float<T>(v);
}
template <class T, bool kStream>
inline void put2(T* p, Vec a, Vec b) {
    store(p, a);
    store(p + 1, b);
}
using Mask = bool;
inline Mask within(Vec v, Vec low, Vec high) { return v > low && v < high; }
template <class T, bool kStream>
inline void put2_where(T* p, const T* from, Mask m, Mask n, Vec a, Vec b) {
    p[0] = m ? from_float<T>(a) : from[0];
    p[1] = n ? from_float<T>(b) : from[1];
}
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

#endif

#if PYSTEER_ISA_LEVEL >= 2
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m256 ab = _mm256_hadd_ps(fold(a), fold(b));
    const __m256 cd = _mm256_hadd_ps(fold(c), fold(d));
    const __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
#endif

// Natural order, unless a set of instructions has a better one above.
template <class T>
inline void load2(const T* p, Vec& a, Vec& b) {
    a = load(p);
    b = load(p + kLanes);
}
template <class T>
inline void load2_as(T, const float* p, Vec& a, Vec& b) {
    load2(p, a, b);
}

template <class T>
inline bool aligned_for_streams(const T* p, std::int64_t stride) {
    constexpr std::int64_t bytes = kLanes * sizeof(T) * (sizeof(T) == 2 ? 2 : 1);
    return reinterpret_cast<std::uintptr_t>(p) % bytes == 0 && stride * std::int64_t(sizeof(T)) % bytes == 0;
}

// One element, with the rounding of the vector form.
inline float fma1(float a, float b, float c) {
#if PYSTEER_ISA_LEVEL >= 2
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
