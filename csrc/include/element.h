// Elements of activations and their conversion to float, one at a time; the vector forms are in simd.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace pysteer {

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(std::uint32_t(value.bits) << 16); }

inline float to_float(Float16 value) {
    const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16;
    const std::uint32_t rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x400u) return float_of(sign | ((rest << 13) + (112u << 23)));
    return float_of(sign | bits_of(float(rest) * 0x1p-24f));  // zero and subnormals
}

template <class T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
inline BFloat16 from_float<BFloat16>(float value) {
    const std::uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {std::uint16_t(bits >> 16 | 0x40u)};
    return {std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    const std::uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return {std::uint16_t(sign | 0x7e00u | (size >> 13 & 0x3ffu))};
    if (size >= 0x47800000u) return {std::uint16_t(sign | 0x7c00u)};  // 65536 and more
    if (size < 0x38800000u) {                                         // below the smallest normal number
        const float shifted = float_of(size) + 0.5f;                  // the sum rounds at the right bit
        return {std::uint16_t(sign | (bits_of(shifted) - bits_of(0.5f)))};
    }
    return {std::uint16_t(sign | ((size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13))};
}

}  // namespace pysteer
