// linear_gate on the CPU: the means of the rows in one read of x, then a gate for each.
//
// The sums are split by row, by channels and by runs of tokens of a fixed size, so that the number of threads changes
// nothing in them. The inner loops are in linear_gate.simd.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "registry.h"
#include "steering_call.h"

namespace pysteer {

constexpr std::int64_t kGda = 0, kOod = 1, kMinMax = 2;  // as KINDS in pysteer/ops/linear_gate.py

struct GateCall {
    const float *weight, *bias, *factor, *scale;
    std::int64_t width, count, rank, kind;
    float threshold;  // below 0: none
};

}  // namespace pysteer

#define PYSTEER_KERNEL "linear_gate.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kChannels = 2048;  // of one piece of work
constexpr std::int64_t kTokens = 512;

struct Sums {
    std::int64_t rows, tokens, width, x_row, x_token, x_channel;
    const std::int32_t* span;
    const std::uint8_t* mask;
    int threads;

    std::int64_t runs() const { return std::max<std::int64_t>((tokens + kTokens - 1) / kTokens, 1); }
    std::int64_t start(std::int64_t r) const { return span ? std::clamp<std::int64_t>(span[2 * r], 0, tokens) : 0; }
    std::int64_t end(std::int64_t r) const {
        return span ? std::clamp<std::int64_t>(span[2 * r + 1], start(r), tokens) : tokens;
    }
    std::int64_t counted(std::int64_t r) const {
        std::int64_t number = end(r) - start(r);
        if (mask) {
            number = 0;
            for (std::int64_t t = start(r); t < end(r); ++t) number += mask[r * tokens + t] != 0;
        }
        return number;
    }
};

// partials: [rows, runs, width]
template <class T>
void add_up(std::uintptr_t address, const Sums& s, std::vector<float>& partials) {
    const T* x = reinterpret_cast<const T*>(address);
    const std::int64_t runs = s.runs(), pieces = (s.width + kChannels - 1) / kChannels;
    const bool by_token = s.width == 1 || s.x_channel == 1;
    const auto tokens_of = PYSTEER_PICK(sum_tokens<T>);
    const auto channel_of = PYSTEER_PICK(sum_channel<T>);
#pragma omp parallel for num_threads(s.threads) schedule(dynamic) if (s.threads > 1)
    for (std::int64_t i = 0; i < s.rows * runs * pieces; ++i) {
        const std::int64_t r = i / (runs * pieces), run = i / pieces % runs, first = i % pieces * kChannels;
        const std::int64_t width = std::min(kChannels, s.width - first);
        const std::int64_t begin = std::max(run * kTokens, s.start(r)), end = std::min((run + 1) * kTokens, s.end(r));
        const std::uint8_t* mask = s.mask ? s.mask + r * s.tokens : nullptr;
        float* sums = partials.data() + (r * runs + run) * s.width + first;
        const T* from = x + r * s.x_row + first * s.x_channel;
        if (by_token) {
            float partial[kChannels];
            tokens_of(from, s.x_token, begin, end, mask, width, partial, sums);
        } else {
            for (std::int64_t d = 0; d < width; ++d) sums[d] = channel_of(from + d * s.x_channel, begin, end, mask);
        }
    }
}

void linear_gate(std::uintptr_t x, std::uintptr_t out, std::uintptr_t weight, std::uintptr_t bias,
                 std::uintptr_t factor, std::uintptr_t scale, std::uintptr_t span, std::uintptr_t mask,
                 std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
                 std::int64_t x_channel, std::int64_t count, std::int64_t rank, std::int64_t kind, std::int64_t dtype,
                 std::int64_t threads, double threshold) {
    const py::gil_scoped_release release;
    const GateCall call{reinterpret_cast<const float*>(weight),
                        reinterpret_cast<const float*>(bias),
                        reinterpret_cast<const float*>(factor),
                        reinterpret_cast<const float*>(scale),
                        width,
                        count,
                        rank,
                        kind,
                        float(threshold)};
    const DType type = DType(dtype);
    const Sums s{rows,
                 tokens,
                 width,
                 x_row,
                 x_token,
                 x_channel,
                 reinterpret_cast<const std::int32_t*>(span),
                 reinterpret_cast<const std::uint8_t*>(mask),
                 threads_for(rows * tokens * width * element_size(type), threads)};
    const std::int64_t runs = s.runs();
    std::vector<float> sums(rows * runs * width), spare(width);
    if (type == DType::float32) add_up<float>(x, s, sums);
    if (type == DType::bfloat16) add_up<BFloat16>(x, s, sums);
    if (type == DType::float16) add_up<Float16>(x, s, sums);
    const auto gate = PYSTEER_PICK(gate_of);
    float* gates = reinterpret_cast<float*>(out);
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t number = s.counted(r);
        float* mean = sums.data() + r * runs * width;
        for (std::int64_t run = 1; run < runs; ++run) {
            for (std::int64_t d = 0; d < width; ++d) mean[d] += mean[run * width + d];
        }
        for (std::int64_t d = 0; d < width; ++d) mean[d] /= float(std::max<std::int64_t>(number, 1));
        gates[r] = number > 0 ? gate(mean, call, spare.data()) : 0.0f;
    }
}

void register_linear_gate(py::module_& m) {
    m.def("linear_gate", &linear_gate, "linear_gate of rows on the CPU; a threshold below 0 is none.");
}

PYSTEER_REGISTER_OP(register_linear_gate)

}  // namespace
}  // namespace pysteer
