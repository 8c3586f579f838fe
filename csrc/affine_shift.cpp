// affine_shift on the CPU: rows and tokens are split over threads, the inner loops are in affine_shift.simd.h.

#include <limits>

#include "packed.h"
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

constexpr std::int64_t kChunkBytes = 64 << 10;    // of one piece of work
constexpr std::int64_t kSummedBytes = 256 << 10;  // of one piece that is summed up
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Banks as they are, or, for the shift of the mean, one set per row: gain 1, the shift of the row as the bias, and
// bounds that hold every value or none.
struct AffineShift {
    Frame frame;
    const float *gain, *bias, *low, *high;
    std::vector<Row> rows;
    int threads;
    bool streaming;
};

inline std::int64_t tokens_in(std::int64_t bytes, std::int64_t bytes_of_token) {
    return std::max<std::int64_t>(bytes / bytes_of_token, 1);
}

inline std::int64_t tokens_of_piece(const Frame& f, std::int64_t element) {
    return tokens_in(kChunkBytes, f.width * element);
}

// Tokens [first, last) of row r.
template <class T>
void shift_piece(const T* x, T* y, const AffineShift& op, std::int64_t r, std::int64_t first, std::int64_t last) {
    const Frame& f = op.frame;
    const Row& row = op.rows[r];
    const T* from = x + r * f.x_row;
    T* to = y + r * f.y_row;
    const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
    const std::int64_t bank = row.set * f.width;
    copy_tokens(from, to, first, start, f);
    PYSTEER_PICK(affine_tokens<T>)
    (from + start * f.x_token, to + start * f.y_token, end - start, f.x_token, f.y_token, f.width, op.gain + bank,
     op.bias + bank, op.low ? op.low + bank : nullptr, op.high ? op.high + bank : nullptr, row.strength, op.streaming);
    copy_tokens(from, to, end, last, f);
}

// Called by all threads of a team, as are the other functions with `omp for`.
template <class T>
void run_by_token(const T* x, T* y, const AffineShift& op) {
    const Frame& f = op.frame;
    const std::int64_t step = tokens_of_piece(f, sizeof(T)), pieces = (f.tokens + step - 1) / step;
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < f.rows * pieces; ++i) {
        const std::int64_t first = i % pieces * step;
        shift_piece(x, y, op, i / pieces, first, std::min(first + step, f.tokens));
    }
}

// With of_mean the mean is taken while the plane is on its way into the cache.
template <class T>
void run_by_channel(const T* x, T* y, const AffineShift& op, bool of_mean) {
    const Frame& f = op.frame;
    const auto shift = PYSTEER_PICK(affine_plane<T>);
    const auto sum = PYSTEER_PICK(sum_of<T>);
    const bool in_place = static_cast<const void*>(x) == y;
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < f.rows * f.width; ++i) {
        const std::int64_t r = i / f.width, d = i % f.width;
        const Row& row = op.rows[r];
        const T* from = x + r * f.x_row + d * f.x_channel;
        T* to = y + r * f.y_row + d * f.y_channel;
        const std::int64_t bank = row.set * f.width + d;
        std::int64_t start = row.start, end = row.end;
        float gain = 1.0f, bias = 0.0f, strength = row.strength;
        if (start < end) gain = op.gain[bank], bias = op.bias[bank];
        const float *low = op.low ? op.low + bank : nullptr, *high = op.high ? op.high + bank : nullptr;
        if (of_mean && start < end) {
            const float mean = float(sum(from + start, end - start)) / float(end - start);
            bias = strength * ((gain - 1.0f) * mean + bias);
            gain = strength = 1.0f;
            if (low && !(mean > *low && mean < *high)) start = end = 0;
            low = high = nullptr;
        }
        if (!in_place) {
            std::memcpy(to, from, start * sizeof(T));
            std::memcpy(to + end, from + end, (f.tokens - end) * sizeof(T));
        }
        if (start == end) continue;
        shift(from + start, to + start, end - start, gain, bias, strength, low, high, op.streaming);
    }
}

// What the mean of each row and channel is to be shifted by, and whether it is: the banks of `run_by_token`.
struct ShiftOfMean {
    std::int64_t step, chunks;
    std::vector<float> sums, gain, bias, low, high;

    ShiftOfMean(const Frame& f, std::int64_t element, bool bounded)
        : step(tokens_in(kSummedBytes, f.width * element)), chunks((f.tokens + step - 1) / step) {
        sums.resize(f.rows * chunks * f.width);
        gain.assign(f.rows * f.width, 1.0f);
        bias.resize(f.rows * f.width);
        if (bounded) {
            low.resize(f.rows * f.width);
            high.resize(f.rows * f.width);
        }
    }

    // Tokens of one chunk of one row; i counts the chunks of all rows.
    template <class T>
    void add_up(const T* x, const AffineShift& op, std::int64_t i) {
        const Frame& f = op.frame;
        const std::int64_t r = i / chunks, first = i % chunks * step, last = std::min(first + step, f.tokens);
        const Row& row = op.rows[r];
        const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
        PYSTEER_PICK(sum_tokens<T>)
        (x + r * f.x_row + start * f.x_token, end - start, f.x_token, f.width, sums.data() + i * f.width);
    }

    // Channels [begin, end) of row r.
    void finish(const AffineShift& op, std::int64_t r, std::int64_t begin, std::int64_t end) {
        const std::int64_t width = op.frame.width;
        const Row& row = op.rows[r];
        if (row.start == row.end) return;
        for (std::int64_t d = begin; d < end; ++d) {
            double total = 0.0;
            for (std::int64_t c = 0; c < chunks; ++c) total += sums[(r * chunks + c) * width + d];
            const float mean = float(total) / float(row.end - row.start);
            const std::int64_t bank = row.set * width + d, i = r * width + d;
            bias[i] = row.strength * ((op.gain[bank] - 1.0f) * mean + op.bias[bank]);
            if (!op.low) continue;
            const bool inside = mean > op.low[bank] && mean < op.high[bank];
            low[i] = inside ? -kInfinity : kInfinity;
            high[i] = -low[i];
        }
    }

    AffineShift as_shift(AffineShift op) const {
        op.gain = gain.data();
        op.bias = bias.data();
        op.low = op.low ? low.data() : nullptr;
        op.high = op.high ? high.data() : nullptr;
        for (std::size_t r = 0; r < op.rows.size(); ++r) op.rows[r].set = std::int64_t(r);
        for (Row& row : op.rows) row.strength = 1.0f;
        return op;
    }
};

// Whole rows where every thread gets some, so that the second read finds them in the cache and nobody waits.
template <class T>
void run_of_mean(const T* x, T* y, const AffineShift& op, ShiftOfMean& means, const AffineShift& shift) {
    const Frame& f = op.frame;
    if (f.rows >= op.threads) {
        const std::int64_t step = tokens_of_piece(f, sizeof(T));
#pragma omp for schedule(static) nowait
        for (std::int64_t r = 0; r < f.rows; ++r) {
            for (std::int64_t c = 0; c < means.chunks; ++c) means.add_up(x, op, r * means.chunks + c);
            means.finish(op, r, 0, f.width);
            for (std::int64_t t = 0; t < f.tokens; t += step) {
                shift_piece(x, y, shift, r, t, std::min(t + step, f.tokens));
            }
        }
        return;
    }
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < f.rows * means.chunks; ++i) means.add_up(x, op, i);
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < f.rows * f.width; ++i) {
        means.finish(op, i / f.width, i % f.width, i % f.width + 1);
    }
    run_by_token(x, y, shift);
}

template <class T>
void run(std::uintptr_t x, std::uintptr_t y, const AffineShift& op, bool of_mean) {
    const T* from = reinterpret_cast<const T*>(x);
    T* to = reinterpret_cast<T*>(y);
    const bool by_token = op.frame.by_token();
    if (by_token && of_mean) {
        ShiftOfMean means(op.frame, sizeof(T), op.low);
        const AffineShift shift = means.as_shift(op);
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
        {
            run_of_mean(from, to, op, means, shift);
            if (op.streaming) finish_streams();
        }
        return;
    }
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        if (by_token) {
            run_by_token(from, to, op);
        } else {
            run_by_channel(from, to, op, of_mean);
        }
        if (op.streaming) finish_streams();
    }
}

int affine_shift(std::uintptr_t x, std::uintptr_t y, std::uintptr_t gain, std::uintptr_t bias, std::uintptr_t slot,
                 std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span, std::uintptr_t low,
                 std::uintptr_t high, std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row,
                 std::int64_t x_token, std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token,
                 std::int64_t y_channel, std::int64_t sets, std::int64_t steps, std::int64_t capacity,
                 std::int64_t dtype, bool of_mean, std::int64_t threads) {
    const py::gil_scoped_release release;
    AffineShift op;
    op.frame = {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel};
    op.gain = reinterpret_cast<const float*>(gain);
    op.bias = reinterpret_cast<const float*>(bias);
    op.low = reinterpret_cast<const float*>(low);
    op.high = reinterpret_cast<const float*>(high);
    const Table table = table_at(slot, strength, clock, span, sets, steps, capacity);
    if (const Status status = read_rows(table, op.frame, op.rows)) return status;
    const DType type = DType(dtype);
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    op.threads = threads_for(bytes, threads);
    op.streaming = worth_streaming(reinterpret_cast<void*>(x), reinterpret_cast<void*>(y), bytes);
    if (type == DType::float32) run<float>(x, y, op, of_mean);
    if (type == DType::bfloat16) run<BFloat16>(x, y, op, of_mean);
    if (type == DType::float16) run<Float16>(x, y, op, of_mean);
    return ok;
}

void register_affine_shift(py::module_& m) {
    def_kernel<&affine_shift>(m, "affine_shift",
                              "affine_shift on the CPU; returns 0, 1 (clock outside) or 2 (slot outside).");
#ifdef PYSTEER_WITH_CUDA
    m.def("affine_shift_cuda", &affine_shift_cuda, "affine_shift on the current CUDA device.");
#endif
}

PYSTEER_REGISTER_OP(register_affine_shift)

}  // namespace
}  // namespace pysteer
