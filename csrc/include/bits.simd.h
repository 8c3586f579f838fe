// The bits of numbers as vectors of integers for one instruction set: included by kernel files behind simd.h, within a
// namespace of their own. No include guard.
//
//   kStep                           2 kLanes, the elements of a Step
//   Step<T>                         the bits of so many elements of T: reading and writing, sizes without the sign,
//                                   largest and lowest per element or of all, counting, and the floats they stand for
//   place<T>(half, lane)            which element of a step a float lane is

#if PYSTEER_ISA_LEVEL >= 2
inline __m128i low_of(__m256i a) { return _mm256_castsi256_si128(a); }
inline __m128i high_of(__m256i a) { return _mm256_extracti128_si256(a, 1); }
inline __m128i swap64(__m128i a) { return _mm_shuffle_epi32(a, 0x4e); }
inline __m128i swap32(__m128i a) { return _mm_shuffle_epi32(a, 0xb1); }
// The only instruction that searches all lanes finds the smallest of eight unsigned ones.
inline std::uint32_t first_of_min(__m128i a, std::uint32_t turned) {
    const __m128i t = _mm_set1_epi16(short(turned));
    return (std::uint32_t(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(a, t)))) ^ turned) & 0xffffu;
}
// Sums of all lanes; lanes of 16 bits hold less than 2^15.
inline std::uint32_t fold_sum32(__m128i a) {
    a = _mm_add_epi32(a, swap64(a));
    return std::uint32_t(_mm_cvtsi128_si32(_mm_add_epi32(a, swap32(a))));
}
inline std::uint32_t fold_sum32(__m256i a) { return fold_sum32(_mm_add_epi32(low_of(a), high_of(a))); }
inline std::uint32_t fold_sum16(__m256i a) { return fold_sum32(_mm256_madd_epi16(a, _mm256_set1_epi16(1))); }
inline std::uint16_t fold_max_s16(__m256i a) { return first_of_min(_mm_max_epi16(low_of(a), high_of(a)), 0x7fff); }
inline std::uint16_t fold_max_u16(__m256i a) { return first_of_min(_mm_max_epu16(low_of(a), high_of(a)), 0xffff); }
inline std::uint16_t fold_min_u16(__m256i a) { return first_of_min(_mm_min_epu16(low_of(a), high_of(a)), 0); }
#endif

#if PYSTEER_ISA_LEVEL >= 3
using Ints = __m512i;
inline Ints read_ints(const void* p) { return _mm512_loadu_si512(p); }
inline void write_ints(void* p, Ints a) { _mm512_storeu_si512(p, a); }
inline Ints both_of(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints all32(std::uint32_t a) { return _mm512_set1_epi32(int(a)); }
inline Ints all16(std::uint16_t a) { return _mm512_set1_epi16(short(a)); }
inline Ints max_s32(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints max_u32(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
inline Ints min_u32(Ints a, Ints b) { return _mm512_min_epu32(a, b); }
inline Ints max_s16(Ints a, Ints b) { return _mm512_max_epi16(a, b); }
inline Ints max_u16(Ints a, Ints b) { return _mm512_max_epu16(a, b); }
inline Ints min_u16(Ints a, Ints b) { return _mm512_min_epu16(a, b); }
inline Vec as_floats(Ints a) { return _mm512_castsi512_ps(a); }
inline void widen(BFloat16, Ints v, Vec& a, Vec& b) {
    a = as_floats(_mm512_slli_epi32(v, 16));
    b = as_floats(_mm512_and_si512(v, all32(0xffff0000u)));
}
inline void widen(Float16, Ints v, Vec& a, Vec& b) {
    a = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
    b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
}
// One more in every lane whose size is below the limit.
inline Ints count_below32(Ints n, Ints size, Ints limit) {
    return _mm512_mask_add_epi32(n, _mm512_cmplt_epu32_mask(size, limit), n, all32(1));
}
inline Ints count_zeros32(Ints n, Ints size) {
    return _mm512_mask_add_epi32(n, _mm512_testn_epi32_mask(size, size), n, all32(1));
}
inline Ints plus32(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints plus16(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
inline Ints count_below16(Ints n, Ints size, Ints limit) {
    return _mm512_mask_add_epi16(n, _mm512_cmplt_epu16_mask(size, limit), n, all16(1));
}
inline __m256i low_of(Ints a) { return _mm512_castsi512_si256(a); }
inline __m256i high_of(Ints a) { return _mm512_extracti64x4_epi64(a, 1); }
inline std::uint32_t fold_sum32(Ints a) { return std::uint32_t(_mm512_reduce_add_epi32(a)); }
inline std::uint32_t fold_sum16(Ints a) { return fold_sum32(_mm512_madd_epi16(a, all16(1))); }
inline std::uint32_t fold_max_s32(Ints a) { return std::uint32_t(_mm512_reduce_max_epi32(a)); }
inline std::uint32_t fold_max_u32(Ints a) { return _mm512_reduce_max_epu32(a); }
inline std::uint32_t fold_min_u32(Ints a) { return _mm512_reduce_min_epu32(a); }
inline std::uint16_t fold_max_s16(Ints a) { return fold_max_s16(_mm256_max_epi16(low_of(a), high_of(a))); }
inline std::uint16_t fold_max_u16(Ints a) { return fold_max_u16(_mm256_max_epu16(low_of(a), high_of(a))); }
inline std::uint16_t fold_min_u16(Ints a) { return fold_min_u16(_mm256_min_epu16(low_of(a), high_of(a))); }
#elif PYSTEER_ISA_LEVEL == 2
using Ints = __m256i;
inline Ints read_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void write_ints(void* p, Ints a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Ints both_of(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints all32(std::uint32_t a) { return _mm256_set1_epi32(int(a)); }
inline Ints all16(std::uint16_t a) { return _mm256_set1_epi16(short(a)); }
inline Ints max_s32(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Ints max_u32(Ints a, Ints b) { return _mm256_max_epu32(a, b); }
inline Ints min_u32(Ints a, Ints b) { return _mm256_min_epu32(a, b); }
inline Ints max_s16(Ints a, Ints b) { return _mm256_max_epi16(a, b); }
inline Ints max_u16(Ints a, Ints b) { return _mm256_max_epu16(a, b); }
inline Ints min_u16(Ints a, Ints b) { return _mm256_min_epu16(a, b); }
inline Vec as_floats(Ints a) { return _mm256_castsi256_ps(a); }
inline void widen(BFloat16, Ints v, Vec& a, Vec& b) {
    a = as_floats(_mm256_slli_epi32(v, 16));
    b = as_floats(_mm256_and_si256(v, all32(0xffff0000u)));
}
inline void widen(Float16, Ints v, Vec& a, Vec& b) {
    a = _mm256_cvtph_ps(_mm256_castsi256_si128(v));
    b = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
}
inline std::uint32_t fold_max_s32(Ints a) {
    __m128i b = _mm_max_epi32(low_of(a), high_of(a));
    b = _mm_max_epi32(b, swap64(b));
    return std::uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(b, swap32(b))));
}
inline std::uint32_t fold_max_u32(Ints a) {
    __m128i b = _mm_max_epu32(low_of(a), high_of(a));
    b = _mm_max_epu32(b, swap64(b));
    return std::uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(b, swap32(b))));
}
inline std::uint32_t fold_min_u32(Ints a) {
    __m128i b = _mm_min_epu32(low_of(a), high_of(a));
    b = _mm_min_epu32(b, swap64(b));
    return std::uint32_t(_mm_cvtsi128_si32(_mm_min_epu32(b, swap32(b))));
}
inline Ints plus32(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints plus16(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
// Sizes have no sign bit, and the limits none either: signed comparison is right.
inline Ints count_below32(Ints n, Ints size, Ints limit) {
    return _mm256_sub_epi32(n, _mm256_cmpgt_epi32(limit, size));
}
inline Ints count_zeros32(Ints n, Ints size) {
    return _mm256_sub_epi32(n, _mm256_cmpeq_epi32(size, all32(0)));
}
inline Ints count_below16(Ints n, Ints size, Ints limit) {
    return _mm256_sub_epi16(n, _mm256_cmpgt_epi16(limit, size));
}
#else
using Ints = std::uint32_t;  // one element of 32 bits, or two of 16
inline std::uint32_t fold_sum32(Ints a) { return a; }
inline std::uint32_t fold_sum16(Ints a) { return (a & 0xffffu) + (a >> 16); }
inline std::uint32_t fold_max_s32(Ints a) { return a; }
inline std::uint32_t fold_max_u32(Ints a) { return a; }
inline std::uint32_t fold_min_u32(Ints a) { return a; }
inline std::uint16_t fold_max_s16(Ints a) {
    return std::uint16_t(std::max(std::int16_t(a & 0xffffu), std::int16_t(a >> 16)));
}
inline std::uint16_t fold_max_u16(Ints a) { return std::uint16_t(std::max(a & 0xffffu, a >> 16)); }
inline std::uint16_t fold_min_u16(Ints a) { return std::uint16_t(std::min(a & 0xffffu, a >> 16)); }
inline Ints read_ints(const void* p) {
    Ints a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void write_ints(void* p, Ints a) { std::memcpy(p, &a, sizeof a); }
inline Ints both_of(Ints a, Ints b) { return a & b; }
inline Ints all32(std::uint32_t a) { return a; }
inline Ints all16(std::uint16_t a) { return a * 0x10001u; }
inline Ints max_s32(Ints a, Ints b) { return std::uint32_t(std::max(std::int32_t(a), std::int32_t(b))); }
inline Ints max_u32(Ints a, Ints b) { return std::max(a, b); }
inline Ints min_u32(Ints a, Ints b) { return std::min(a, b); }
template <class F>
inline Ints by_half(Ints a, Ints b, F choose) {
    return Ints(choose(a & 0xffffu, b & 0xffffu)) | Ints(choose(a >> 16, b >> 16)) << 16;
}
inline Ints max_s16(Ints a, Ints b) {
    return by_half(a, b, [](Ints l, Ints r) { return std::int16_t(l) > std::int16_t(r) ? l : r; });
}
inline Ints max_u16(Ints a, Ints b) {
    return by_half(a, b, [](Ints l, Ints r) { return std::max(l, r); });
}
inline Ints min_u16(Ints a, Ints b) {
    return by_half(a, b, [](Ints l, Ints r) { return std::min(l, r); });
}
inline Vec as_floats(Ints a) { return float_of(a); }
template <class T>
inline void widen(T, Ints v, Vec& a, Vec& b) {
    a = to_float(T{std::uint16_t(v & 0xffffu)});
    b = to_float(T{std::uint16_t(v >> 16)});
}
inline Ints plus32(Ints a, Ints b) { return a + b; }
inline Ints plus16(Ints a, Ints b) { return ((a + b) & 0xffffu) | ((a >> 16) + (b >> 16)) << 16; }
inline Ints count_below32(Ints n, Ints size, Ints limit) { return n + (size < limit); }
inline Ints count_zeros32(Ints n, Ints size) { return n + (size == 0); }
inline Ints count_below16(Ints n, Ints size, Ints limit) {
    return n + Ints((size & 0xffffu) < (limit & 0xffffu)) + (Ints((size >> 16) < (limit >> 16)) << 16);
}
#endif

inline Vec plus(Vec a, Vec b) {
#if PYSTEER_ISA_LEVEL >= 3
    return _mm512_add_ps(a, b);
#elif PYSTEER_ISA_LEVEL == 2
    return _mm256_add_ps(a, b);
#else
    return a + b;
#endif
}

constexpr int kStep = 2 * kLanes;

// The bits of a step, for elements of 32 and of 16 bits.
template <class T>
struct Step {
    using Bits = std::uint16_t;
    Ints v;
    static Step read(const void* p) { return {read_ints(p)}; }
    static Step all(std::uint16_t a) { return {all16(a)}; }
    void write(void* p) const { write_ints(p, v); }
    Step sizes() const { return {both_of(v, all16(0x7fff))}; }
    Step largest(Step b) const { return {max_s16(v, b.v)}; }
    Step highest(Step b) const { return {max_u16(v, b.v)}; }
    Step lowest(Step b) const { return {min_u16(v, b.v)}; }
    Step count(Step size, Step limit) const { return {count_below16(v, size.v, limit.v)}; }
    Step plus(Step b) const { return {plus16(v, b.v)}; }
    void floats(Vec& a, Vec& b) const { widen(T{}, v, a, b); }
    std::int64_t fold_sum() const { return fold_sum16(v); }
    Bits fold_largest() const { return fold_max_s16(v); }
    Bits fold_highest() const { return fold_max_u16(v); }
    Bits fold_lowest() const { return fold_min_u16(v); }
};
template <>
struct Step<float> {
    using Bits = std::uint32_t;
    Ints v, w;
    static Step read(const void* p) { return {read_ints(p), read_ints(static_cast<const float*>(p) + kLanes)}; }
    static Step all(std::uint32_t a) { return {all32(a), all32(a)}; }
    void write(void* p) const {
        write_ints(p, v);
        write_ints(static_cast<std::uint32_t*>(p) + kLanes, w);
    }
    Step sizes() const { return {both_of(v, all32(0x7fffffffu)), both_of(w, all32(0x7fffffffu))}; }
    Step largest(Step b) const { return {max_s32(v, b.v), max_s32(w, b.w)}; }
    Step highest(Step b) const { return {max_u32(v, b.v), max_u32(w, b.w)}; }
    Step lowest(Step b) const { return {min_u32(v, b.v), min_u32(w, b.w)}; }
    Step count(Step size, Step limit) const {
        return {count_below32(v, size.v, limit.v), count_below32(w, size.w, limit.w)};
    }
    Step plus(Step b) const { return {plus32(v, b.v), plus32(w, b.w)}; }
    void floats(Vec& a, Vec& b) const {
        a = as_floats(v);
        b = as_floats(w);
    }
    std::int64_t fold_sum() const { return fold_sum32(plus32(v, w)); }
    Bits fold_largest() const { return fold_max_s32(max_s32(v, w)); }
    Bits fold_highest() const { return fold_max_u32(max_u32(v, w)); }
    Bits fold_lowest() const { return fold_min_u32(min_u32(v, w)); }
};

// Where lane i of the first and of the second vector of a step lies among its elements.
template <class T>
inline int place(int half, int lane) {
    return std::is_same<T, BFloat16>::value ? 2 * lane + half : half * kLanes + lane;
}
