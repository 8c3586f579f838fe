// gradient_shift on the CPU: blocks of tokens are split over threads, the inner loops are in gradient_shift.simd.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "packed.h"
#include "registry.h"
#include "steering_call.h"

namespace pysteer {

constexpr std::int64_t kNone = 0, kInput = 2;  // as _NORMALIZE in pysteer/ops/gradient_shift.py; 1 is unit length

// The parameters that hold for one row.
struct GradientSet {
    const float *weight, *offset, *centre, *target, *factor, *own;
    std::int64_t width, prototypes, rank, normalize;
    float scale, strength, temperature;
    bool gate;
};

constexpr std::int64_t kBlock = 48;  // tokens of one piece of work

}  // namespace pysteer

#define PYSTEER_KERNEL "gradient_shift.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

struct GradientShift {
    Frame frame;
    const float *weight, *offset, *centre, *target, *factor, *scale;
    std::int64_t prototypes, rank, normalize;
    float temperature;
    bool gate;
    std::vector<Row> rows;
    int threads;
    std::vector<std::int64_t> place;  // of a set among those in use
    std::vector<float> own;           // what own_products gives for each of them

    GradientSet set_of(std::int64_t number, float strength) const {
        const std::int64_t bank = number * prototypes, width = frame.width;
        return {weight + bank * width,
                offset + bank,
                centre + bank * width,
                target + bank,
                factor + number * rank * width,
                own.data() + place[number] * prototypes * rank,
                width,
                prototypes,
                rank,
                normalize,
                scale[number],
                strength,
                temperature,
                gate};
    }

    void prepare_sets(std::int64_t sets) {
        place.assign(sets, -1);
        std::int64_t used = 0;
        for (const Row& row : rows) {
            if (row.start < row.end && place[row.set] < 0) place[row.set] = used++;
        }
        own.resize(used * prototypes * rank);
        for (std::int64_t number = 0; number < sets; ++number) {
            if (place[number] >= 0) {
                PYSTEER_PICK(own_products)
                (set_of(number, 0.0f), own.data() + place[number] * prototypes * rank);
            }
        }
    }
};

template <class T>
void run(std::uintptr_t x_address, std::uintptr_t y_address, const GradientShift& op) {
    const T* x = reinterpret_cast<const T*>(x_address);
    T* y = reinterpret_cast<T*>(y_address);
    const Frame& f = op.frame;
    const bool by_token = f.by_token();
    const auto shift = by_token ? PYSTEER_PICK(gradient_tokens<T>) : PYSTEER_PICK(gradient_channels<T>);
    const std::int64_t blocks = (f.tokens + kBlock - 1) / kBlock, longest = std::min(kBlock, f.tokens);
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        std::vector<float> scratch(longest * f.width), products(longest * (op.prototypes + op.rank)), u(f.width);
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < f.rows * blocks; ++i) {
            const std::int64_t r = i / blocks, first = i % blocks * kBlock, last = std::min(first + kBlock, f.tokens);
            const Row& row = op.rows[r];
            const T* from = x + r * f.x_row;
            T* to = y + r * f.y_row;
            const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
            const auto copy = by_token ? copy_tokens<T> : copy_channels<T>;
            copy(from, to, first, start, f);
            copy(from, to, end, last, f);
            if (start == end) continue;
            const std::int64_t x_step = by_token ? f.x_token : 1, y_step = by_token ? f.y_token : 1;
            shift(from + start * x_step, to + start * y_step, end - start, by_token ? f.x_token : f.x_channel,
                  by_token ? f.y_token : f.y_channel, op.set_of(row.set, row.strength), scratch.data(), products.data(),
                  u.data());
        }
    }
}

int gradient_shift(std::uintptr_t x, std::uintptr_t y, std::uintptr_t weight, std::uintptr_t offset,
                   std::uintptr_t centre, std::uintptr_t target, std::uintptr_t factor, std::uintptr_t scale,
                   std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span,
                   std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
                   std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token, std::int64_t y_channel,
                   std::int64_t sets, std::int64_t prototypes, std::int64_t rank, std::int64_t steps,
                   std::int64_t capacity, bool gate, double temperature, std::int64_t normalize, std::int64_t dtype,
                   std::int64_t threads) {
    const py::gil_scoped_release release;
    GradientShift op;
    op.frame = {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel};
    op.weight = reinterpret_cast<const float*>(weight);
    op.offset = reinterpret_cast<const float*>(offset);
    op.centre = reinterpret_cast<const float*>(centre);
    op.target = reinterpret_cast<const float*>(target);
    op.factor = reinterpret_cast<const float*>(factor);
    op.scale = reinterpret_cast<const float*>(scale);
    op.prototypes = prototypes;
    op.rank = rank;
    op.gate = gate;
    op.temperature = float(temperature);
    op.normalize = normalize;
    const Table table = table_at(slot, strength, clock, span, sets, steps, capacity);
    if (const Status status = read_rows(table, op.frame, op.rows)) return status;
    op.prepare_sets(sets);
    const DType type = DType(dtype);
    op.threads =
        threads_for(rows * tokens * width * element_size(type) * std::max<std::int64_t>(prototypes / 8, 1), threads);
    if (type == DType::float32) run<float>(x, y, op);
    if (type == DType::bfloat16) run<BFloat16>(x, y, op);
    if (type == DType::float16) run<Float16>(x, y, op);
    return ok;
}

void register_gradient_shift(py::module_& m) {
    def_kernel<&gradient_shift>(m, "gradient_shift",
                                "gradient_shift on the CPU, K >= 1; returns 0, 1 (clock outside) or 2 (slot outside).");
}

PYSTEER_REGISTER_OP(register_gradient_shift)

}  // namespace
}  // namespace pysteer
