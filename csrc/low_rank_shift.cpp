// low_rank_shift on the CPU: blocks of tokens are split over threads, the inner loops are in low_rank_shift.simd.h.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "packed.h"
#include "registry.h"
#include "steering_call.h"

namespace pysteer {

constexpr int kLargestRank = 64;

// The parameters that hold for one row.
struct RankSet {
    const float *read, *write, *bias;
    std::int64_t width, rank;
    float strength;
};

}  // namespace pysteer

#define PYSTEER_KERNEL "low_rank_shift.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kMostTokens = 32;         // in scratch: the longest strip of tokens next to each other
constexpr std::int64_t kBlockTokens = 96;        // tokens of one piece of work, channels next to each other
constexpr std::int64_t kBlockChannels = 4 * 32;  // tokens of one piece of work, tokens next to each other

struct LowRankShift {
    Frame frame;
    const float *read, *write, *bias;
    std::int64_t rank;
    std::vector<Row> rows;
    int threads;
    bool streaming;

    RankSet set_of(const Row& row) const {
        const std::int64_t bank = row.set * rank * frame.width;
        return {read + bank, write + bank, bias + row.set * frame.width, frame.width, rank, row.strength};
    }
};

template <class T>
void run(std::uintptr_t x_address, std::uintptr_t y_address, const LowRankShift& op) {
    const T* x = reinterpret_cast<const T*>(x_address);
    T* y = reinterpret_cast<T*>(y_address);
    const Frame& f = op.frame;
    const bool by_token = f.by_token();
    const auto shift_tokens = PYSTEER_PICK(low_rank_tokens<T>);
    const auto shift_channels = PYSTEER_PICK(low_rank_channels<T>);
    const auto copy = by_token ? copy_tokens<T> : copy_channels<T>;
    const std::int64_t block = by_token ? kBlockTokens : kBlockChannels, blocks = (f.tokens + block - 1) / block;
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        std::vector<float> scratch(kMostTokens * f.width);
#pragma omp for schedule(dynamic) nowait
        for (std::int64_t i = 0; i < f.rows * blocks; ++i) {
            const std::int64_t r = i / blocks, first = i % blocks * block, last = std::min(first + block, f.tokens);
            const Row& row = op.rows[r];
            const T* from = x + r * f.x_row;
            T* to = y + r * f.y_row;
            const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
            copy(from, to, first, start, f);
            copy(from, to, end, last, f);
            if (start == end) continue;
            if (by_token) {
                shift_tokens(from + start * f.x_token, to + start * f.y_token, end - start, f.x_token, f.y_token,
                             op.set_of(row), op.streaming, scratch.data());
            } else {
                shift_channels(from + start, to + start, end - start, f.x_channel, f.y_channel, op.set_of(row),
                               scratch.data());
            }
        }
        if (op.streaming) finish_streams();
    }
}

int low_rank_shift(std::uintptr_t x, std::uintptr_t y, std::uintptr_t read, std::uintptr_t write, std::uintptr_t bias,
                   std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span,
                   std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
                   std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token, std::int64_t y_channel,
                   std::int64_t sets, std::int64_t rank, std::int64_t steps, std::int64_t capacity, std::int64_t dtype,
                   std::int64_t threads) {
    const py::gil_scoped_release release;
    LowRankShift op;
    op.frame = {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel};
    op.read = reinterpret_cast<const float*>(read);
    op.write = reinterpret_cast<const float*>(write);
    op.bias = reinterpret_cast<const float*>(bias);
    op.rank = rank;
    const Table table = table_at(slot, strength, clock, span, sets, steps, capacity);
    if (const Status status = read_rows(table, op.frame, op.rows)) return status;
    const DType type = DType(dtype);
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    op.threads = threads_for(bytes * std::max<std::int64_t>(rank / 8, 1), threads);
    op.streaming = worth_streaming(reinterpret_cast<void*>(x), reinterpret_cast<void*>(y), bytes);
    if (type == DType::float32) run<float>(x, y, op);
    if (type == DType::bfloat16) run<BFloat16>(x, y, op);
    if (type == DType::float16) run<Float16>(x, y, op);
    return ok;
}

void register_low_rank_shift(py::module_& m) {
    def_kernel<&low_rank_shift>(
        m, "low_rank_shift",
        "low_rank_shift on the CPU, ranks 1 to 64; returns 0, 1 (clock outside) or 2 (slot outside).");
}

PYSTEER_REGISTER_OP(register_low_rank_shift)

}  // namespace
}  // namespace pysteer
