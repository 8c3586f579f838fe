// Vectors of floats for one instruction set. each_isa.h includes this file once per set, inside a namespace of that
// set, with PYSTEER_ISA_LEVEL 0 (plain C++), 2 (AVX2, FMA, F16C) or 3 (AVX-512 F, BW, VL, DQ). No include guard.
//
//   kLanes                     floats in a Vec
//   load(p), store(p, v)       of float, BFloat16, Float16; store rounds once, to nearest even
//   load_first(p, n)           the first n floats, zeros behind them
//   stream(p, v)               store past the caches; p aligned to the bytes written
//   put<T, kStream>(p, v)      one of the two
//   sum4(a, b, c, d, out)      the sums of the lanes of four vectors

#if PYSTEER_ISA_LEVEL == 3

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float a) { return _mm512_set1_ps(a); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p); }

// The instruction for this (AVX512_BF16) flushes subnormal numbers to zero, so the rounding is done in integers.
inline __m256i narrow(Vec v, BFloat16) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i round = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, even), _mm512_set1_epi32(0x7fff)), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    round = _mm512_mask_or_epi32(round, nan, high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(round);
}
inline __m256i narrow(Vec v, Float16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
template <class T>
inline void store(T* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}
template <class T>
inline void stream(T* p, Vec v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}

inline __m256 fold(Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

#elif PYSTEER_ISA_LEVEL == 2

using Vec = __m256;
constexpr int kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float a) { return _mm256_set1_ps(a); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
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

inline __m128i narrow(Vec v, BFloat16) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i round = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, even), _mm256_set1_epi32(0x7fff)), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    round = _mm256_blendv_epi8(round, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(round), _mm256_extracti128_si256(round, 1));
}
inline __m128i narrow(Vec v, Float16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
template <class T>
inline void store(T* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
}
template <class T>
inline void stream(T* p, Vec v) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
}

inline __m256 fold(Vec v) { return v; }

#else

using Vec = float;
constexpr int kLanes = 1;

inline Vec zero() { return 0.0f; }
inline Vec set1(float a) { return a; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
template <class T>
inline Vec load(const T* p) {
    return to_float(*p);
}
inline Vec load_first(const float*, int) { return 0.0f; }
template <class T>
inline void store(T* p, Vec v) {
    *p = from_float<T>(v);
}
template <class T>
inline void stream(T* p, Vec v) {
    store(p, v);
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
inline void finish_streams() { _mm_sfence(); }
#else
inline void finish_streams() {}
#endif

template <class T, bool kStream>
inline void put(T* p, Vec v) {
    if (kStream) {
        stream(p, v);
    } else {
        store(p, v);
    }
}

// One element, with the rounding of the vector form.
inline float fma1(float a, float b, float c) {
#if PYSTEER_ISA_LEVEL >= 2
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
