// residual_shift on the CPU: rows and tokens are split over threads, the inner loops are in residual_shift.simd.h.

#include "registry.h"
#include "steering_call.h"

#define PYSTEER_KERNEL "residual_shift.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kChunkBytes = 64 << 10;  // of one piece of work

struct ResidualShift {
    Frame frame;
    std::int64_t f_row, f_token, f_channel;
    bool by_token;
    const float *gate, *gain, *bias;
    std::vector<Row> rows;
    int threads;
    bool streaming;
};

// Called by all threads of a team, as is run_by_channel.
template <class T, class F>
void run_by_token(const T* x, const F* f, T* y, const ResidualShift& op) {
    const Frame& at = op.frame;
    const auto residual = PYSTEER_PICK(residual_tokens<T, F>);
    const std::int64_t step = std::max<std::int64_t>(kChunkBytes / std::int64_t(at.width * sizeof(T)), 1);
    const std::int64_t chunks = (at.tokens + step - 1) / step;
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < at.rows * chunks; ++i) {
        const std::int64_t r = i / chunks, first = i % chunks * step, last = std::min(first + step, at.tokens);
        const Row& row = op.rows[r];
        const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
        const float* gate = op.gate ? op.gate + r * at.width : nullptr;
        const auto part = [&](std::int64_t begin, std::int64_t stop, const float* gain, const float* bias) {
            if (begin == stop) return;
            residual(x + r * at.x_row + begin * at.x_token, f + r * op.f_row + begin * op.f_token,
                     y + r * at.y_row + begin * at.y_token, stop - begin, at.x_token, op.f_token, at.y_token, at.width,
                     gate, gain, bias, row.strength, op.streaming);
        };
        part(first, start, nullptr, nullptr);
        part(start, end, op.gain + row.set * at.width, op.bias + row.set * at.width);
        part(end, last, nullptr, nullptr);
    }
}

template <class T, class F>
void run_by_channel(const T* x, const F* f, T* y, const ResidualShift& op) {
    const Frame& at = op.frame;
    const auto residual = PYSTEER_PICK(residual_plane<T, F>);
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < at.rows * at.width; ++i) {
        const std::int64_t r = i / at.width, d = i % at.width;
        const Row& row = op.rows[r];
        const float* gate = op.gate ? op.gate + i : nullptr;
        const std::int64_t bank = row.set * at.width + d;
        const auto part = [&](std::int64_t begin, std::int64_t stop, const float* gain, const float* bias) {
            if (begin == stop) return;
            residual(x + r * at.x_row + d * at.x_channel + begin, f + r * op.f_row + d * op.f_channel + begin,
                     y + r * at.y_row + d * at.y_channel + begin, stop - begin, gate, gain, bias, row.strength,
                     op.streaming);
        };
        part(0, row.start, nullptr, nullptr);
        part(row.start, row.end, op.gain + bank, op.bias + bank);
        part(row.end, at.tokens, nullptr, nullptr);
    }
}

template <class T, class F>
void run(std::uintptr_t x, std::uintptr_t f, std::uintptr_t y, const ResidualShift& op) {
    const T* from = reinterpret_cast<const T*>(x);
    const F* branch = reinterpret_cast<const F*>(f);
    T* to = reinterpret_cast<T*>(y);
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        if (op.by_token) {
            run_by_token(from, branch, to, op);
        } else {
            run_by_channel(from, branch, to, op);
        }
        if (op.streaming) finish_streams();
    }
}

int residual_shift(std::uintptr_t x, std::uintptr_t f, std::uintptr_t y, std::uintptr_t gate, std::uintptr_t gain,
                   std::uintptr_t bias, std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock,
                   std::uintptr_t span, std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row,
                   std::int64_t x_token, std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token,
                   std::int64_t y_channel, std::int64_t f_row, std::int64_t f_token, std::int64_t f_channel,
                   std::int64_t sets, std::int64_t steps, std::int64_t capacity, std::int64_t dtype,
                   std::int64_t f_dtype, std::int64_t threads) {
    const py::gil_scoped_release release;
    ResidualShift op;
    op.frame = {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel};
    op.f_row = f_row, op.f_token = f_token, op.f_channel = f_channel;
    op.by_token = op.frame.by_token() && (width == 1 || f_channel == 1);
    op.gate = reinterpret_cast<const float*>(gate);
    op.gain = reinterpret_cast<const float*>(gain);
    op.bias = reinterpret_cast<const float*>(bias);
    const Table table = table_at(slot, strength, clock, span, sets, steps, capacity);
    if (const Status status = read_rows(table, op.frame, op.rows)) return status;
    const DType type = DType(dtype), other = DType(f_dtype);
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    op.threads = threads_for(bytes, threads);
    op.streaming = worth_streaming(reinterpret_cast<void*>(x), reinterpret_cast<void*>(y), bytes);
    if (type == DType::bfloat16) run<BFloat16, BFloat16>(x, f, y, op);
    if (type == DType::float16) run<Float16, Float16>(x, f, y, op);
    if (type == DType::float32 && other == DType::float32) run<float, float>(x, f, y, op);
    if (type == DType::float32 && other == DType::bfloat16) run<float, BFloat16>(x, f, y, op);
    if (type == DType::float32 && other == DType::float16) run<float, Float16>(x, f, y, op);
    return ok;
}

void register_residual_shift(py::module_& m) {
    m.def("residual_shift", &residual_shift,
          "residual_shift on the CPU; returns 0, 1 (clock outside) or 2 (slot outside).");
}

PYSTEER_REGISTER_OP(register_residual_shift)

}  // namespace
}  // namespace pysteer
