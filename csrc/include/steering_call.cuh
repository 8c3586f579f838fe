// What the CUDA kernels of the steering ops share: the steering table read on the device, elements and 16-byte packs.
//
// A clock outside the table or a set outside the bank cannot be reported without waiting for the device: such rows have
// `known` false and come out as NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace pysteer {
namespace device {

struct Table {
    const std::int32_t* slot;
    const float* strength;
    const std::int64_t* clock;
    const std::int32_t* span;  // null: all tokens
    std::int64_t sets, steps, capacity;
};

struct Frame {
    std::int64_t rows, tokens, width;
    std::int64_t x_row, x_token, x_channel;
    std::int64_t y_row, y_token, y_channel;
};

struct Row {
    std::int64_t set;
    float strength;
    std::int64_t start, end;  // tokens that are changed
    bool active, known;
};

__device__ inline Row read_row(const Table& table, const Frame& frame, std::int64_t r) {
    Row row{-1, 1.0f, 0, frame.tokens, true, false};
    const std::int64_t step = *table.clock;
    if (step < 0 || step >= table.steps) return row;
    row.set = table.slot[step * table.capacity + r];
    row.strength = table.strength[step * table.capacity + r];
    row.active = row.set != 0 && row.strength != 0.0f;
    row.known = row.set > 0 && row.set < table.sets;
    if (table.span) {
        row.start = table.span[2 * r];
        row.end = table.span[2 * r + 1];
    }
    return row;
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}

// kCount elements that are read and written by one instruction: 16 bytes, or a single element.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
    T value[kCount];
};

// Left to itself the compiler splits these for sm_80 and sm_90.
template <class T, int kCount>
__device__ inline Pack<T, kCount> read(const T* p) {
    Pack<T, kCount> pack;
    if constexpr (sizeof(pack) == 16) {
        const uint4 bits = *reinterpret_cast<const uint4*>(p);
        memcpy(&pack, &bits, 16);
    } else {
        pack.value[0] = *p;
    }
    return pack;
}

template <class T, int kCount>
__device__ inline void write(T* p, const Pack<T, kCount>& pack) {
    if constexpr (sizeof(pack) == 16) {
        uint4 bits;
        memcpy(&bits, &pack, 16);
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     :
                     : "l"(p), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                     : "memory");
    } else {
        *p = pack.value[0];
    }
}

// kCount floats of a parameter bank, in 16-byte reads where there are enough of them.
template <int kCount>
__device__ inline void read_floats(const float* p, float* out) {
    if constexpr (kCount % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            const float4 four = __ldg(reinterpret_cast<const float4*>(p + i));
            out[i] = four.x;
            out[i + 1] = four.y;
            out[i + 2] = four.z;
            out[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) out[i] = __ldg(p + i);
    }
}

inline bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

inline void check_launch(const char* op) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace device
}  // namespace pysteer
