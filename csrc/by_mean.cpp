// Ops on the CPU that shift the tokens of a row by what they make of its mean: mlp_shift, and forms of low_rank_shift
// and affine_shift. One read of x for the means (row_sums.h), one vector per row in between, one pass for the shift.

#include <cmath>
#include <limits>
#include <vector>

#include "packed.h"
#include "registry.h"
#include "steering_call.h"

#define PYSTEER_KERNEL "by_mean.simd.h"
#include "each_isa.h"
#include "row_sums.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kChunkBytes = 64 << 10;  // of one piece of work
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Given {
    std::uintptr_t x, y;
    Frame frame;
    Table table;
    DType type;
    std::int64_t threads;
};

// What affine_shift takes for every row, [rows, width] each; low and high are empty without bounds.
struct Shifts {
    std::vector<float> gain, bias, low, high;
};

template <class T>
void shift_piece(const Given& g, const Shifts& shifts, const Row& row, std::int64_t r, std::int64_t first,
                 std::int64_t last, bool streaming) {
    const Frame& f = g.frame;
    const T* from = reinterpret_cast<const T*>(g.x) + r * f.x_row;
    T* to = reinterpret_cast<T*>(g.y) + r * f.y_row;
    const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
    const std::int64_t at = r * f.width;
    copy_tokens(from, to, first, start, f);
    PYSTEER_PICK(affine_tokens<T>)
    (from + start * f.x_token, to + start * f.y_token, end - start, f.x_token, f.y_token, f.width,
     shifts.gain.data() + at, shifts.bias.data() + at, shifts.low.empty() ? nullptr : shifts.low.data() + at,
     shifts.high.empty() ? nullptr : shifts.high.data() + at, row.strength, streaming);
    copy_tokens(from, to, end, last, f);
}

template <class T>
void shift_channel(const Given& g, const Shifts& shifts, const Row& row, std::int64_t r, std::int64_t d,
                   bool streaming) {
    const Frame& f = g.frame;
    const T* from = reinterpret_cast<const T*>(g.x) + r * f.x_row + d * f.x_channel;
    T* to = reinterpret_cast<T*>(g.y) + r * f.y_row + d * f.y_channel;
    if (g.x != g.y) {
        std::memcpy(to, from, row.start * sizeof(T));
        std::memcpy(to + row.end, from + row.end, (f.tokens - row.end) * sizeof(T));
    }
    if (row.start == row.end) return;
    const std::int64_t at = r * f.width + d;
    PYSTEER_PICK(affine_plane<T>)
    (from + row.start, to + row.start, row.end - row.start, shifts.gain[at], shifts.bias[at], row.strength,
     shifts.low.empty() ? nullptr : shifts.low.data() + at, shifts.high.empty() ? nullptr : shifts.high.data() + at,
     streaming);
}

template <class T>
void shift_all(const Given& g, const Shifts& shifts, const std::vector<Row>& rows, int threads, bool streaming) {
    const Frame& f = g.frame;
    const std::int64_t step = std::max<std::int64_t>(kChunkBytes / std::int64_t(f.width * sizeof(T)), 1);
    const std::int64_t pieces = f.by_token() ? (f.tokens + step - 1) / step : f.width;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (std::int64_t i = 0; i < f.rows * pieces; ++i) {
            const std::int64_t r = i / pieces, piece = i % pieces;
            if (f.by_token()) {
                const std::int64_t last = std::min((piece + 1) * step, f.tokens);
                shift_piece<T>(g, shifts, rows[r], r, piece * step, last, streaming);
            } else {
                shift_channel<T>(g, shifts, rows[r], r, piece, streaming);
            }
        }
        if (streaming) finish_streams();
    }
}

// `make(set, mean, r, shifts)` fills in row r; each row is made by itself, so that none depends on the others.
template <class Make>
Status run(const Given& g, bool bounded, const Make& make) {
    const Frame& f = g.frame;
    std::vector<Row> rows;
    if (const Status status = read_rows(g.table, f, rows)) return status;
    std::vector<std::int32_t> span;  // nothing is read of rows that are left alone
    for (const Row& row : rows) {
        span.push_back(std::int32_t(row.start));
        span.push_back(std::int32_t(row.end));
    }
    const std::int64_t bytes = f.rows * f.tokens * f.width * element_size(g.type);
    const int threads = threads_for(bytes, g.threads);
    const std::vector<float> means = means_of(
        g.x, g.type, Sums{f.rows, f.tokens, f.width, f.x_row, f.x_token, f.x_channel, span.data(), nullptr, threads});
    Shifts shifts;
    shifts.gain.assign(f.rows * f.width, 1.0f);
    shifts.bias.resize(f.rows * f.width);
    if (bounded) {
        shifts.low.resize(f.rows * f.width);
        shifts.high.resize(f.rows * f.width);
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (std::int64_t r = 0; r < f.rows; ++r) {
        if (rows[r].start < rows[r].end) make(rows[r].set, means.data() + r * f.width, r, shifts);
    }
    const bool streaming = worth_streaming(reinterpret_cast<void*>(g.x), reinterpret_cast<void*>(g.y), bytes);
    if (g.type == DType::float32) shift_all<float>(g, shifts, rows, threads, streaming);
    if (g.type == DType::bfloat16) shift_all<BFloat16>(g, shifts, rows, threads, streaming);
    if (g.type == DType::float16) shift_all<Float16>(g, shifts, rows, threads, streaming);
    return ok;
}

template <class T>
const T* at(std::uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

float gelu(float v) { return 0.5f * v * (1.0f + std::erf(v * 0.70710678f)); }

int mlp_shift(std::uintptr_t x, std::uintptr_t y, std::uintptr_t first, std::uintptr_t first_bias,
              std::uintptr_t second, std::uintptr_t second_bias, std::uintptr_t third, std::uintptr_t third_bias,
              std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span,
              std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
              std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token, std::int64_t y_channel,
              std::int64_t sets, std::int64_t steps, std::int64_t capacity, std::int64_t dtype, std::int64_t threads,
              std::int64_t hidden, bool residual) {
    const py::gil_scoped_release release;
    const Given g{x,
                  y,
                  {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel},
                  table_at(slot, strength, clock, span, sets, steps, capacity),
                  DType(dtype),
                  threads};
    return run(g, false, [=](std::int64_t set, const float* mean, std::int64_t r, Shifts& shifts) {
        const auto dense = PYSTEER_PICK(dense);
        std::vector<float> one(hidden), two(hidden);
        dense(at<float>(first) + set * hidden * width, at<float>(first_bias) + set * hidden, mean, hidden, width,
              one.data());
        for (float& v : one) v = gelu(v);
        dense(at<float>(second) + set * hidden * hidden, at<float>(second_bias) + set * hidden, one.data(), hidden,
              hidden, two.data());
        for (float& v : two) v = gelu(v);
        float* shift = shifts.bias.data() + r * width;
        dense(at<float>(third) + set * width * hidden, at<float>(third_bias) + set * width, two.data(), width, hidden,
              shift);
        for (std::int64_t d = 0; d < width && !residual; ++d) shift[d] -= mean[d];
    });
}

int low_rank_by_mean(std::uintptr_t x, std::uintptr_t y, std::uintptr_t read, std::uintptr_t write, std::uintptr_t bias,
                     std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span,
                     std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row,
                     std::int64_t x_token, std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token,
                     std::int64_t y_channel, std::int64_t sets, std::int64_t steps, std::int64_t capacity,
                     std::int64_t dtype, std::int64_t threads, std::int64_t rank) {
    const py::gil_scoped_release release;
    const Given g{x,
                  y,
                  {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel},
                  table_at(slot, strength, clock, span, sets, steps, capacity),
                  DType(dtype),
                  threads};
    return run(g, false, [=](std::int64_t set, const float* mean, std::int64_t r, Shifts& shifts) {
        std::vector<float> along(rank);
        PYSTEER_PICK(dense)(at<float>(read) + set * rank * width, nullptr, mean, rank, width, along.data());
        float* shift = shifts.bias.data() + r * width;
        std::copy_n(at<float>(bias) + set * width, width, shift);
        for (std::int64_t k = 0; k < rank; ++k) {
            PYSTEER_PICK(add_scaled)(along[k], at<float>(write) + (set * rank + k) * width, width, shift);
        }
    });
}

int affine_by_mean(std::uintptr_t x, std::uintptr_t y, std::uintptr_t gain, std::uintptr_t bias, std::uintptr_t low,
                   std::uintptr_t high, std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock,
                   std::uintptr_t span, std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row,
                   std::int64_t x_token, std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token,
                   std::int64_t y_channel, std::int64_t sets, std::int64_t steps, std::int64_t capacity,
                   std::int64_t dtype, std::int64_t threads) {
    const py::gil_scoped_release release;
    const Given g{x,
                  y,
                  {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel},
                  table_at(slot, strength, clock, span, sets, steps, capacity),
                  DType(dtype),
                  threads};
    return run(g, true, [=](std::int64_t set, const float* mean, std::int64_t r, Shifts& shifts) {
        const std::int64_t to = r * width, from = set * width;
        std::copy_n(at<float>(gain) + from, width, shifts.gain.begin() + to);
        std::copy_n(at<float>(bias) + from, width, shifts.bias.begin() + to);
        for (std::int64_t d = 0; d < width; ++d) {  // bounds that hold every value of the channel or none
            const bool inside = mean[d] > at<float>(low)[from + d] && mean[d] < at<float>(high)[from + d];
            shifts.low[to + d] = inside ? -kInfinity : kInfinity;
            shifts.high[to + d] = -shifts.low[to + d];
        }
    });
}

void register_by_mean(py::module_& m) {
    constexpr const char* kReturns = "On the CPU; returns 0, 1 (clock outside) or 2 (slot outside).";
    def_kernel<&mlp_shift>(m, "mlp_shift", kReturns);
    def_kernel<&low_rank_by_mean>(m, "low_rank_by_mean", kReturns);
    def_kernel<&affine_by_mean>(m, "affine_by_mean", kReturns);
}

PYSTEER_REGISTER_OP(register_by_mean)

}  // namespace
}  // namespace pysteer
