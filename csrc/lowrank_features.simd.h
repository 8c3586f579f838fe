// Inner loop of lowrank_features for one instruction set, included by each_isa.h.

namespace {

// Sortable bits: unsigned order of the results is the order of the numbers.
#if PYSTEER_ISA_LEVEL >= 3
inline void write_keys(std::uint32_t* to, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i turn = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(int(0x80000000u)));
    _mm512_storeu_si512(to, _mm512_xor_si512(bits, turn));
}
#elif PYSTEER_ISA_LEVEL == 2
inline void write_keys(std::uint32_t* to, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i turn = _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(int(0x80000000u)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(bits, turn));
}
#else
inline void write_keys(std::uint32_t* to, Vec v) {
    const std::uint32_t bits = bits_of(v);
    *to = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
#endif

inline double sum_of(const double* parts) {
    double sum = 0.0;
    for (int l = 0; l < kParts; ++l) sum += parts[l];
    return sum;
}

// `size` is a multiple of kParts.
inline double dot(const double* a, const double* b, std::int64_t size) {
    double parts[kParts] = {};
    for (std::int64_t i = 0; i < size; i += kParts) {
        for (int l = 0; l < kParts; ++l) parts[l] += a[i + l] * b[i + l];
    }
    return sum_of(parts);
}

}  // namespace

// Keys of rows 0 to 3 and columns 0 to columns - 1 of a product: four rows of `up` [., rank] with `down` [rank, n], of
// which the columns are padded to whole vectors of 32. keys: [4][columns].
void product_keys(const float* const* up, const float* down, std::int64_t rank, std::int64_t n, std::int64_t columns,
                  std::uint32_t* keys) {
    for (std::int64_t j = 0; j < columns; j += 2 * kLanes) {
        Vec sum[4][2];
        for (int i = 0; i < 4; ++i) sum[i][0] = sum[i][1] = zero();
        for (std::int64_t k = 0; k < rank; ++k) {
            const Vec a = load(down + k * n + j), b = load(down + k * n + j + kLanes);
            for (int i = 0; i < 4; ++i) {
                const Vec u = set1(up[i][k]);
                sum[i][0] = fma(u, a, sum[i][0]);
                sum[i][1] = fma(u, b, sum[i][1]);
            }
        }
        for (int i = 0; i < 4; ++i) {
            write_keys(keys + i * columns + j, sum[i][0]);
            write_keys(keys + i * columns + j + kLanes, sum[i][1]);
        }
    }
}

// Inner products [rank][rank] of `rank` vectors of `size` numbers, and the sum of each.
void gram_of(const double* vectors, std::int64_t rank, std::int64_t size, double* gram, double* sums) {
    for (std::int64_t j = 0; j < rank; ++j) {
        double parts[kParts] = {};
        for (std::int64_t i = 0; i < size; i += kParts) {
            for (int l = 0; l < kParts; ++l) parts[l] += vectors[j * size + i + l];
        }
        sums[j] = sum_of(parts);
        for (std::int64_t k = 0; k <= j; ++k) {
            gram[j * rank + k] = gram[k * rank + j] = dot(vectors + j * size, vectors + k * size, size);
        }
    }
}
