// affine_shift on the CPU: rows and tokens are split over threads, the inner loops are in affine_shift.simd.h.

#include "registry.h"
#include "steering_call.h"

#define PYSTEER_KERNEL "affine_shift.simd.h"
#include "each_isa.h"

#ifdef PYSTEER_WITH_CUDA
#include "affine_shift.h"
#endif

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kChunkBytes = 64 << 10;  // of one piece of work

struct AffineShift {
    Frame frame;
    const float *gain, *bias;
    std::vector<Row> rows;
    int threads;
    bool streaming;
};

// Called by all threads of a team, as is run_by_channel.
template <class T>
void run_by_token(const T* x, T* y, const AffineShift& op) {
    const Frame& f = op.frame;
    const auto shift = PYSTEER_PICK(affine_tokens<T>);
    const std::int64_t step = std::max<std::int64_t>(kChunkBytes / std::int64_t(f.width * sizeof(T)), 1);
    const std::int64_t chunks = (f.tokens + step - 1) / step;
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < f.rows * chunks; ++i) {
        const std::int64_t r = i / chunks, first = i % chunks * step, last = std::min(first + step, f.tokens);
        const Row& row = op.rows[r];
        const T* from = x + r * f.x_row;
        T* to = y + r * f.y_row;
        const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
        copy_tokens(from, to, first, start, f);
        shift(from + start * f.x_token, to + start * f.y_token, end - start, f.x_token, f.y_token, f.width,
              op.gain + row.set * f.width, op.bias + row.set * f.width, row.strength, op.streaming);
        copy_tokens(from, to, end, last, f);
    }
}

template <class T>
void run_by_channel(const T* x, T* y, const AffineShift& op) {
    const Frame& f = op.frame;
    const auto shift = PYSTEER_PICK(affine_plane<T>);
    const bool in_place = static_cast<const void*>(x) == y;
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < f.rows * f.width; ++i) {
        const std::int64_t r = i / f.width, d = i % f.width;
        const Row& row = op.rows[r];
        const T* from = x + r * f.x_row + d * f.x_channel;
        T* to = y + r * f.y_row + d * f.y_channel;
        if (!in_place) {
            std::memcpy(to, from, row.start * sizeof(T));
            std::memcpy(to + row.end, from + row.end, (f.tokens - row.end) * sizeof(T));
        }
        if (row.start == row.end) continue;
        const std::int64_t bank = row.set * f.width + d;
        shift(from + row.start, to + row.start, row.end - row.start, op.gain[bank], op.bias[bank], row.strength,
              op.streaming);
    }
}

template <class T>
void run(std::uintptr_t x, std::uintptr_t y, const AffineShift& op) {
    const T* from = reinterpret_cast<const T*>(x);
    T* to = reinterpret_cast<T*>(y);
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        if (op.frame.by_token()) {
            run_by_token(from, to, op);
        } else {
            run_by_channel(from, to, op);
        }
        if (op.streaming) finish_streams();
    }
}

int affine_shift(std::uintptr_t x, std::uintptr_t y, std::uintptr_t gain, std::uintptr_t bias, std::uintptr_t slot,
                 std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span, std::int64_t rows,
                 std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
                 std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token, std::int64_t y_channel,
                 std::int64_t sets, std::int64_t steps, std::int64_t capacity, std::int64_t dtype,
                 std::int64_t threads) {
    const py::gil_scoped_release release;
    AffineShift op;
    op.frame = {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel};
    op.gain = reinterpret_cast<const float*>(gain);
    op.bias = reinterpret_cast<const float*>(bias);
    const Table table{reinterpret_cast<const std::int32_t*>(slot),
                      reinterpret_cast<const float*>(strength),
                      reinterpret_cast<const std::int64_t*>(clock),
                      reinterpret_cast<const std::int32_t*>(span),
                      sets,
                      steps,
                      capacity};
    if (const Status status = read_rows(table, op.frame, op.rows)) return status;
    const DType type = DType(dtype);
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    op.threads = threads_for(bytes, threads);
    op.streaming = worth_streaming(reinterpret_cast<void*>(x), reinterpret_cast<void*>(y), bytes);
    if (type == DType::float32) run<float>(x, y, op);
    if (type == DType::bfloat16) run<BFloat16>(x, y, op);
    if (type == DType::float16) run<Float16>(x, y, op);
    return ok;
}

void register_affine_shift(py::module_& m) {
    m.def("affine_shift", &affine_shift, "affine_shift on the CPU; returns 0, 1 (clock outside) or 2 (slot outside).");
#ifdef PYSTEER_WITH_CUDA
    m.def("affine_shift_cuda", &affine_shift_cuda, "affine_shift on the current CUDA device.");
#endif
}

PYSTEER_REGISTER_OP(register_affine_shift)

}  // namespace
}  // namespace pysteer
