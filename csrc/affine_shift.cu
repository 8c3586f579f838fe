// affine_shift on CUDA: y = a x + c with a = 1 + s (g - 1) and c = s b, one read and one write of the activation.
//
// Channels next to each other: a thread keeps a and c of its channels in registers and walks over tokens. Tokens next
// to each other: a thread takes packs of tokens, each within one channel.

#include "affine_shift.h"

#include "steering_call.cuh"

namespace pysteer {
namespace {

using namespace device;

constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // packs in flight

struct Call {
    Frame frame;
    Table table;
    const float *gain, *bias;
    bool in_place;
};

__device__ inline void coefficients(const Row& row, float gain, float bias, float& a, float& c) {
    a = row.known ? fmaf(row.strength, gain - 1.0f, 1.0f) : nanf("");
    c = row.known ? row.strength * bias : nanf("");
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) shift_tokens(const T* x, T* y, Call call, int columns) {
    const Frame& f = call.frame;
    const std::int64_t packs = f.width / kPack, tiles = (packs + columns - 1) / columns;
    const int lanes = kThreads / columns, lane = threadIdx.x / columns;
    const std::int64_t chunk = std::int64_t(lanes) * kPerThread, chunks = (f.tokens + chunk - 1) / chunk;
    const std::int64_t r = blockIdx.x / (tiles * chunks), rest = blockIdx.x % (tiles * chunks);
    const std::int64_t column = rest % tiles * columns + threadIdx.x % columns, first = rest / tiles * chunk + lane;
    if (column >= packs) return;
    const Row row = read_row(call.table, f, r);
    if (!row.active && call.in_place) return;

    const std::int64_t d = column * kPack;
    float a[kPack], c[kPack];
    if (row.active) {
        const std::int64_t bank = (row.known ? row.set : 0) * f.width + d;
        read_floats<kPack>(call.gain + bank, a);
        read_floats<kPack>(call.bias + bank, c);
#pragma unroll
        for (int i = 0; i < kPack; ++i) coefficients(row, a[i], c[i], a[i], c[i]);
    }
    Pack<T, kPack> values[kPerThread];
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
        const std::int64_t t = first + u * lanes;
        if (t < f.tokens) values[u] = read<T, kPack>(x + r * f.x_row + t * f.x_token + d);
    }
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
        const std::int64_t t = first + u * lanes;
        if (t >= f.tokens) continue;
        if (row.active && t >= row.start && t < row.end) {
#pragma unroll
            for (int i = 0; i < kPack; ++i) {
                values[u].value[i] = from_float<T>(fmaf(a[i], to_float(values[u].value[i]), c[i]));
            }
        } else if (call.in_place) {
            continue;
        }
        write<T, kPack>(y + r * f.y_row + t * f.y_token + d, values[u]);
    }
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) shift_channels(const T* x, T* y, Call call) {
    const Frame& f = call.frame;
    const unsigned packs = unsigned(f.tokens / kPack), total = unsigned(f.width) * packs;
    const unsigned chunk = kThreads * kPerThread, chunks = (total + chunk - 1) / chunk;
    const std::int64_t r = blockIdx.x / chunks;
    const unsigned first = blockIdx.x % chunks * chunk + threadIdx.x;
    const Row row = read_row(call.table, f, r);
    if (!row.active && call.in_place) return;
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
        const unsigned i = first + u * kThreads;
        if (i >= total) return;
        const unsigned d = i / packs;
        const std::int64_t t = std::int64_t(i % packs) * kPack;
        auto values = read<T, kPack>(x + r * f.x_row + d * f.x_channel + t);
        if (row.active) {
            const std::int64_t bank = (row.known ? row.set : 0) * f.width + d;
            float a, c;
            coefficients(row, __ldg(call.gain + bank), __ldg(call.bias + bank), a, c);
#pragma unroll
            for (int e = 0; e < kPack; ++e) {
                if (t + e >= row.start && t + e < row.end) {
                    values.value[e] = from_float<T>(fmaf(a, to_float(values.value[e]), c));
                }
            }
        }
        write<T, kPack>(y + r * f.y_row + d * f.y_channel + t, values);
    }
}

template <class T, int kPack>
void launch(const T* x, T* y, const Call& call, bool by_token, cudaStream_t stream) {
    const Frame& f = call.frame;
    if (by_token) {
        const std::int64_t packs = f.width / kPack;
        int columns = 1;
        while (columns < kThreads && columns < packs) columns *= 2;
        const std::int64_t chunk = std::int64_t(kThreads / columns) * kPerThread;
        const std::int64_t blocks = f.rows * ((packs + columns - 1) / columns) * ((f.tokens + chunk - 1) / chunk);
        shift_tokens<T, kPack><<<unsigned(blocks), kThreads, 0, stream>>>(x, y, call, columns);
    } else {
        const std::int64_t chunk = kThreads * kPerThread, total = f.width * (f.tokens / kPack);
        shift_channels<T, kPack><<<unsigned(f.rows * ((total + chunk - 1) / chunk)), kThreads, 0, stream>>>(x, y, call);
    }
    check_launch("affine_shift");
}

template <class T>
void choose(std::uintptr_t x_address, std::uintptr_t y_address, const Call& call, cudaStream_t stream) {
    constexpr int kPack = 16 / sizeof(T);
    const T* x = reinterpret_cast<const T*>(x_address);
    T* y = reinterpret_cast<T*>(y_address);
    const Frame& f = call.frame;
    const bool by_token = f.width == 1 || (f.x_channel == 1 && f.y_channel == 1);
    const std::int64_t along = by_token ? f.width : f.tokens;
    const std::int64_t across = by_token ? f.x_token | f.y_token : f.x_channel | f.y_channel;
    const bool packed = (along | across | f.x_row | f.y_row) % kPack == 0 && aligned(x) && aligned(y) &&
                        aligned(call.gain) && aligned(call.bias);
    if (packed) {
        launch<T, kPack>(x, y, call, by_token, stream);
    } else {
        launch<T, 1>(x, y, call, by_token, stream);
    }
}

}  // namespace

void affine_shift_cuda(std::uintptr_t x, std::uintptr_t y, std::uintptr_t gain, std::uintptr_t bias,
                       std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span,
                       std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row,
                       std::int64_t x_token, std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token,
                       std::int64_t y_channel, std::int64_t sets, std::int64_t steps, std::int64_t capacity,
                       std::int64_t dtype, std::uintptr_t stream) {
    const Call call{{rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel},
                    {reinterpret_cast<const std::int32_t*>(slot), reinterpret_cast<const float*>(strength),
                     reinterpret_cast<const std::int64_t*>(clock), reinterpret_cast<const std::int32_t*>(span), sets,
                     steps, capacity},
                    reinterpret_cast<const float*>(gain),
                    reinterpret_cast<const float*>(bias),
                    x == y};
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    if (DType(dtype) == DType::float32) choose<float>(x, y, call, queue);
    if (DType(dtype) == DType::bfloat16) choose<__nv_bfloat16>(x, y, call, queue);
    if (DType(dtype) == DType::float16) choose<__half>(x, y, call, queue);
}

}  // namespace pysteer
