// prototype_shift with the hard choice on CUDA, for few prototypes; many are better off on the matrix units (Triton).
//
// A warp takes four tokens. Its lanes split the channels and keep the dot products of the four tokens with eight
// prototypes in registers, so every weight that is read serves four tokens. 32 sums over 32 lanes are then added up and
// dealt out in 31 exchanges: lane l holds the score of token l / 8 with prototype l % 8.

#include "prototype_shift.h"

#include "steering_call.cuh"

namespace pysteer {
namespace {

using namespace device;

constexpr int kWarps = 4;
constexpr int kTokens = 4;  // of a warp
constexpr int kTile = 8;    // prototypes at a time
constexpr unsigned kAll = 0xffffffffu;

struct Call {
    Frame frame;
    Table table;
    const float *weight, *offset, *delta;
    std::int64_t prototypes;
    bool pull, in_place;
};

template <int kHalf>
__device__ inline float deal_out(float (&sums)[kTokens * kTile], int lane) {
    const bool upper = lane & kHalf;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
        const float keep = upper ? sums[i + kHalf] : sums[i], give = upper ? sums[i] : sums[i + kHalf];
        sums[i] = keep + __shfl_xor_sync(kAll, give, kHalf);
    }
    if constexpr (kHalf > 1) {
        return deal_out<kHalf / 2>(sums, lane);
    } else {
        return sums[0];
    }
}

// Dot products of four tokens with the prototypes first..first + 7, of which `count` exist.
template <class T, int kPack>
__device__ inline void score_tile(const T* const (&x)[kTokens], std::int64_t stride, const float* weight,
                                  std::int64_t width, int count, int lane, float (&sums)[kTokens * kTile]) {
#pragma unroll
    for (int i = 0; i < kTokens * kTile; ++i) sums[i] = 0.0f;
    for (std::int64_t d = lane * kPack; d < width; d += 32 * kPack) {
        float values[kTokens][kPack];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const auto pack = read<T, kPack>(x[t] + d * stride);
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[t][i] = to_float(pack.value[i]);
        }
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            if (k < count) {
                float w[kPack];
                read_floats<kPack>(weight + k * width + d, w);
#pragma unroll
                for (int t = 0; t < kTokens; ++t) {
#pragma unroll
                    for (int i = 0; i < kPack; ++i) {
                        sums[t * kTile + k] = fmaf(values[t][i], w[i], sums[t * kTile + k]);
                    }
                }
            }
        }
    }
}

template <class T, int kPack>
__device__ inline int find_nearest(const T* const (&x)[kTokens], const Call& call, std::int64_t set, int lane) {
    const Frame& f = call.frame;
    const int prototypes = int(call.prototypes);
    float best = -INFINITY;
    int nearest = 0;  // of token lane / 8, the same in its eight lanes
    for (int first = 0; first < prototypes; first += kTile) {
        float sums[kTokens * kTile];
        const int count = min(kTile, prototypes - first);
        const std::int64_t bank = set * prototypes + first;
        score_tile<T, kPack>(x, f.x_channel, call.weight + bank * f.width, f.width, count, lane, sums);
        float score = deal_out<kTokens * kTile / 2>(sums, lane);
        int index = first + lane % kTile;
        score = index < prototypes ? score + call.offset[bank + lane % kTile] : -INFINITY;
#pragma unroll
        for (int step = 1; step < kTile; step *= 2) {
            const float other = __shfl_xor_sync(kAll, score, step);
            const int other_index = __shfl_xor_sync(kAll, index, step);
            if (other > score || (other == score && other_index < index)) {
                score = other;
                index = other_index;
            }
        }
        if (score > best) {
            best = score;
            nearest = index;
        }
    }
    return nearest;
}

template <class T, int kPack>
__device__ inline void add_shift(const T* x, T* y, const float* delta, const Call& call, const Row& row, bool touched,
                                 int lane) {
    const Frame& f = call.frame;
    for (std::int64_t d = lane * kPack; d < f.width; d += 32 * kPack) {
        auto pack = read<T, kPack>(x + d * f.x_channel);
        if (touched) {
            float u[kPack];
            read_floats<kPack>(delta + d, u);
#pragma unroll
            for (int i = 0; i < kPack; ++i) {
                const float value = to_float(pack.value[i]);
                const float shift = call.pull ? u[i] - value : u[i];
                pack.value[i] = from_float<T>(row.known ? fmaf(row.strength, shift, value) : nanf(""));
            }
        }
        write<T, kPack>(y + d * f.y_channel, pack);
    }
}

template <class T, int kPack>
__global__ void __launch_bounds__(32 * kWarps) shift_tokens(const T* x, T* y, Call call) {
    const Frame& f = call.frame;
    const std::int64_t chunk = kWarps * kTokens, chunks = (f.tokens + chunk - 1) / chunk;
    const std::int64_t r = blockIdx.x / chunks;
    const std::int64_t first = blockIdx.x % chunks * chunk + threadIdx.x / 32 * kTokens;
    const int lane = threadIdx.x % 32;
    if (first >= f.tokens) return;
    const Row row = read_row(call.table, f, r);
    if (!row.active && call.in_place) return;

    const std::int64_t set = row.known ? row.set : 0;
    int nearest = 0;
    if (row.active && row.known && call.prototypes > 1) {
        const T* tokens[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            tokens[t] = x + r * f.x_row + min(first + t, f.tokens - 1) * f.x_token;
        }
        nearest = find_nearest<T, kPack>(tokens, call, set, lane);
    }
    for (int t = 0; t < kTokens; ++t) {
        const int index = __shfl_sync(kAll, nearest, t * kTile);
        const std::int64_t token = first + t;
        if (token >= f.tokens) return;
        const bool touched = row.active && token >= row.start && token < row.end;
        if (!touched && call.in_place) continue;
        const float* delta = call.delta + (set * call.prototypes + index) * f.width;
        add_shift<T, kPack>(x + r * f.x_row + token * f.x_token, y + r * f.y_row + token * f.y_token, delta, call, row,
                            touched, lane);
    }
}

template <class T>
void choose(std::uintptr_t x_address, std::uintptr_t y_address, const Call& call, cudaStream_t stream) {
    constexpr int kPack = 16 / sizeof(T);
    const T* x = reinterpret_cast<const T*>(x_address);
    T* y = reinterpret_cast<T*>(y_address);
    const Frame& f = call.frame;
    const bool packed = f.x_channel == 1 && f.y_channel == 1 &&
                        (f.width | f.x_token | f.y_token | f.x_row | f.y_row) % kPack == 0 && aligned(x) &&
                        aligned(y) && aligned(call.weight) && aligned(call.delta);
    const std::int64_t chunk = kWarps * kTokens;
    const unsigned blocks = unsigned(f.rows * ((f.tokens + chunk - 1) / chunk));
    if (packed) {
        shift_tokens<T, kPack><<<blocks, 32 * kWarps, 0, stream>>>(x, y, call);
    } else {
        shift_tokens<T, 1><<<blocks, 32 * kWarps, 0, stream>>>(x, y, call);
    }
    check_launch("prototype_shift");
}

}  // namespace

void prototype_shift_cuda(std::uintptr_t x, std::uintptr_t y, std::uintptr_t weight, std::uintptr_t offset,
                          std::uintptr_t delta, std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock,
                          std::uintptr_t span, std::int64_t rows, std::int64_t tokens, std::int64_t width,
                          std::int64_t x_row, std::int64_t x_token, std::int64_t x_channel, std::int64_t y_row,
                          std::int64_t y_token, std::int64_t y_channel, std::int64_t sets, std::int64_t prototypes,
                          std::int64_t steps, std::int64_t capacity, std::int64_t pull, std::int64_t dtype,
                          std::uintptr_t stream) {
    const Call call{{rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel},
                    {reinterpret_cast<const std::int32_t*>(slot), reinterpret_cast<const float*>(strength),
                     reinterpret_cast<const std::int64_t*>(clock), reinterpret_cast<const std::int32_t*>(span), sets,
                     steps, capacity},
                    reinterpret_cast<const float*>(weight),
                    reinterpret_cast<const float*>(offset),
                    reinterpret_cast<const float*>(delta),
                    prototypes,
                    pull != 0,
                    x == y};
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    if (DType(dtype) == DType::float32) choose<float>(x, y, call, queue);
    if (DType(dtype) == DType::bfloat16) choose<__nv_bfloat16>(x, y, call, queue);
    if (DType(dtype) == DType::float16) choose<__half>(x, y, call, queue);
}

}  // namespace pysteer
