// affine_shift on CUDA: y = a x + c with a = 1 + s (g - 1) and c = s b, one read and one write of the activation.
//
// Channels next to each other: a thread keeps a and c of its channels in registers and walks over tokens. Tokens next
// to each other: a thread takes packs of tokens, each within one channel. For the shift of the mean the sums over
// tokens are taken first, in parts that are added in a fixed order.

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
    const float *gain, *bias, *low, *high;  // low and high null: no bounds
    const float* sums;                      // over the tokens, [R, D]; null: the shift is that of the value itself
    bool in_place;
};

// y = a x + c where low < x < high, for kPack channels of a row.
template <int kPack>
struct Maps {
    float a[kPack], c[kPack], low[kPack], high[kPack];
};

template <bool kBounded, int kPack>
__device__ inline void set_map(Maps<kPack>& maps, int i, const Row& row, const Call& call, std::int64_t r,
                               std::int64_t d, std::int64_t count) {
    const float gain = maps.a[i], bias = maps.c[i];
    if (!row.known) {
        maps.a[i] = maps.c[i] = nanf("");
        maps.low[i] = -INFINITY, maps.high[i] = INFINITY;
    } else if (call.sums) {
        const float mean = call.sums[r * call.frame.width + d] / float(count);
        const bool inside = !kBounded || (mean > maps.low[i] && mean < maps.high[i]);
        maps.a[i] = 1.0f;
        maps.c[i] = row.strength * fmaf(gain - 1.0f, mean, bias);
        maps.low[i] = inside ? -INFINITY : INFINITY, maps.high[i] = -maps.low[i];
    } else {
        maps.a[i] = fmaf(row.strength, gain - 1.0f, 1.0f);
        maps.c[i] = row.strength * bias;
    }
}

template <bool kBounded, int kPack>
__device__ inline Maps<kPack> read_maps(const Row& row, const Call& call, std::int64_t r, std::int64_t d) {
    const Frame& f = call.frame;
    const std::int64_t bank = (row.known ? row.set : 0) * f.width + d;
    const std::int64_t end = row.end < f.tokens ? row.end : f.tokens, start = row.start > 0 ? row.start : 0;
    Maps<kPack> maps;
    read_floats<kPack>(call.gain + bank, maps.a);
    read_floats<kPack>(call.bias + bank, maps.c);
    if constexpr (kBounded) {
        read_floats<kPack>(call.low + bank, maps.low);
        read_floats<kPack>(call.high + bank, maps.high);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) set_map<kBounded>(maps, i, row, call, r, d + i, end > start ? end - start : 1);
    return maps;
}

template <bool kBounded, class T, int kPack>
__device__ inline T shifted(const Maps<kPack>& maps, int i, T value) {
    const float v = to_float(value);
    if (kBounded && !(v > maps.low[i] && v < maps.high[i])) return value;
    return from_float<T>(fmaf(maps.a[i], v, maps.c[i]));
}

template <class T, int kPack, bool kBounded>
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
    Maps<kPack> maps;
    if (row.active) maps = read_maps<kBounded, kPack>(row, call, r, d);
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
            for (int i = 0; i < kPack; ++i) values[u].value[i] = shifted<kBounded>(maps, i, values[u].value[i]);
        } else if (call.in_place) {
            continue;
        }
        write<T, kPack>(y + r * f.y_row + t * f.y_token + d, values[u]);
    }
}

template <class T, int kPack, bool kBounded>
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
            const Maps<1> maps = read_maps<kBounded, 1>(row, call, r, d);
#pragma unroll
            for (int e = 0; e < kPack; ++e) {
                if (t + e >= row.start && t + e < row.end) {
                    values.value[e] = shifted<kBounded>(maps, 0, values.value[e]);
                }
            }
        }
        write<T, kPack>(y + r * f.y_row + d * f.y_channel + t, values);
    }
}

// The sums of the threads of a block that share a column, in the order of their lanes.
__device__ inline float sum_of_lanes(float* shared, float own, int columns) {
    shared[threadIdx.x] = own;
    __syncthreads();
    float total = 0.0f;
    if (int(threadIdx.x) < columns) {
        for (int i = threadIdx.x; i < kThreads; i += columns) total += shared[i];
    }
    __syncthreads();
    return total;
}

// Sums over one part of the tokens: sums[part, row, d]. A block takes `columns` packs of channels, or, with tokens next
// to each other, one channel (columns 1).
template <class T, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    sum_tokens(const T* x, float* sums, Call call, int parts, bool by_token, int columns) {
    constexpr int kPack = kPacked ? 16 / sizeof(T) : 1;
    __shared__ float shared[kThreads];
    const Frame& f = call.frame;
    const std::int64_t packs = by_token ? f.width / kPack : f.width, tiles = (packs + columns - 1) / columns;
    const std::int64_t r = blockIdx.x / tiles % f.rows, part = blockIdx.x / tiles / f.rows;
    const std::int64_t column = blockIdx.x % tiles * columns + threadIdx.x % columns;
    const std::int64_t unit = by_token ? 1 : kPack, length = (f.tokens / unit + parts - 1) / parts * unit;
    const std::int64_t first = part * length, last = first + length < f.tokens ? first + length : f.tokens;
    const std::int64_t step = kThreads / columns * unit, lane = threadIdx.x / columns;
    const Row row = read_row(call.table, f, r);
    float total[kPack] = {};
    if (row.active && column < packs) {
        const T* from = x + r * f.x_row + (by_token ? column * kPack : column * f.x_channel);
        for (std::int64_t t = first + lane * unit; t < last; t += step) {
            const auto values = read<T, kPack>(from + (by_token ? t * f.x_token : t));
#pragma unroll
            for (int i = 0; i < kPack; ++i) {
                const std::int64_t at = by_token ? t : t + i;
                if (at >= row.start && at < row.end) total[i] += to_float(values.value[i]);
            }
        }
    }
    float* to = sums + (part * f.rows + r) * f.width;
    if (by_token) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            const float sum = sum_of_lanes(shared, total[i], columns);
            if (int(threadIdx.x) < columns && column < packs) to[column * kPack + i] = sum;
        }
    } else {
        float own = 0.0f;
#pragma unroll
        for (int i = 0; i < kPack; ++i) own += total[i];
        const float sum = sum_of_lanes(shared, own, 1);
        if (threadIdx.x == 0) to[column] = sum;
    }
}

// Adds the parts, in order, into the first of them.
__global__ void __launch_bounds__(kThreads) add_parts(float* sums, std::int64_t count, int parts) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    float total = 0.0f;
    for (int part = 0; part < parts; ++part) total += sums[part * count + i];
    sums[i] = total;
}

int columns_of(std::int64_t packs, int most) {
    int columns = 1;
    while (columns < most && columns < packs) columns *= 2;
    return columns;
}

template <class T, int kPack>
void add_up(const T* x, float* sums, const Call& call, bool by_token, int parts, cudaStream_t stream) {
    const Frame& f = call.frame;
    const std::int64_t packs = by_token ? f.width / kPack : f.width;
    const int columns = by_token ? columns_of(packs, 32) : 1;
    const std::int64_t blocks = (packs + columns - 1) / columns * f.rows * parts;
    sum_tokens<T, (kPack > 1)><<<unsigned(blocks), kThreads, 0, stream>>>(x, sums, call, parts, by_token, columns);
    check_launch("affine_shift");
    if (parts == 1) return;
    const std::int64_t count = f.rows * f.width;
    add_parts<<<unsigned((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(sums, count, parts);
    check_launch("affine_shift");
}

template <class T, int kPack, bool kBounded>
void launch(const T* x, T* y, const Call& call, bool by_token, cudaStream_t stream) {
    const Frame& f = call.frame;
    if (by_token) {
        const std::int64_t packs = f.width / kPack;
        const int columns = columns_of(packs, kThreads);
        const std::int64_t chunk = std::int64_t(kThreads / columns) * kPerThread;
        const std::int64_t blocks = f.rows * ((packs + columns - 1) / columns) * ((f.tokens + chunk - 1) / chunk);
        shift_tokens<T, kPack, kBounded><<<unsigned(blocks), kThreads, 0, stream>>>(x, y, call, columns);
    } else {
        const std::int64_t chunk = kThreads * kPerThread, total = f.width * (f.tokens / kPack);
        const std::int64_t blocks = f.rows * ((total + chunk - 1) / chunk);
        shift_channels<T, kPack, kBounded><<<unsigned(blocks), kThreads, 0, stream>>>(x, y, call);
    }
    check_launch("affine_shift");
}

template <class T, int kPack>
void run(const T* x, T* y, float* sums, const Call& call, bool by_token, int parts, cudaStream_t stream) {
    if (sums) add_up<T, kPack>(x, sums, call, by_token, parts, stream);
    if (call.low) {
        launch<T, kPack, true>(x, y, call, by_token, stream);
    } else {
        launch<T, kPack, false>(x, y, call, by_token, stream);
    }
}

template <class T>
void choose(std::uintptr_t x_address, std::uintptr_t y_address, float* sums, const Call& call, int parts,
            cudaStream_t stream) {
    constexpr int kPack = 16 / sizeof(T);
    const T* x = reinterpret_cast<const T*>(x_address);
    T* y = reinterpret_cast<T*>(y_address);
    const Frame& f = call.frame;
    const bool by_token = f.width == 1 || (f.x_channel == 1 && f.y_channel == 1);
    const std::int64_t along = by_token ? f.width : f.tokens;
    const std::int64_t across = by_token ? f.x_token | f.y_token : f.x_channel | f.y_channel;
    const bool packed = (along | across | f.x_row | f.y_row) % kPack == 0 && aligned(x) && aligned(y) &&
                        aligned(call.gain) && aligned(call.bias) && aligned(call.low) && aligned(call.high);
    if (packed) {
        run<T, kPack>(x, y, sums, call, by_token, parts, stream);
    } else {
        run<T, 1>(x, y, sums, call, by_token, parts, stream);
    }
}

}  // namespace

void affine_shift_cuda(std::uintptr_t x, std::uintptr_t y, std::uintptr_t gain, std::uintptr_t bias,
                       std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span,
                       std::uintptr_t low, std::uintptr_t high, std::uintptr_t sums, std::int64_t rows,
                       std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
                       std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token, std::int64_t y_channel,
                       std::int64_t sets, std::int64_t steps, std::int64_t capacity, std::int64_t dtype,
                       std::int64_t parts, std::uintptr_t stream) {
    const Call call{{rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel},
                    {reinterpret_cast<const std::int32_t*>(slot), reinterpret_cast<const float*>(strength),
                     reinterpret_cast<const std::int64_t*>(clock), reinterpret_cast<const std::int32_t*>(span), sets,
                     steps, capacity},
                    reinterpret_cast<const float*>(gain),
                    reinterpret_cast<const float*>(bias),
                    reinterpret_cast<const float*>(low),
                    reinterpret_cast<const float*>(high),
                    reinterpret_cast<const float*>(sums),
                    x == y};
    float* const room = reinterpret_cast<float*>(sums);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    if (DType(dtype) == DType::float32) choose<float>(x, y, room, call, int(parts), queue);
    if (DType(dtype) == DType::bfloat16) choose<__nv_bfloat16>(x, y, room, call, int(parts), queue);
    if (DType(dtype) == DType::float16) choose<__half>(x, y, room, call, int(parts), queue);
}

}  // namespace pysteer
