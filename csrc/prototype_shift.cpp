// prototype_shift on the CPU: blocks of tokens are split over threads, the inner loops are in prototype_shift.simd.h.

#include <cstdint>
#include <vector>

#include "packed.h"
#include "registry.h"
#include "steering_call.h"

namespace pysteer {

// The parameters that hold for one row.
struct PrototypeSet {
    const float *weight, *offset, *delta;
    const float* panels;  // the weights turned over, or null
    std::int64_t width, prototypes;
    float strength;
    bool pull;
};

constexpr std::int64_t kBlock = 48;  // tokens of one piece of work

}  // namespace pysteer

#define PYSTEER_KERNEL "prototype_shift.simd.h"
#include "each_isa.h"

#ifdef PYSTEER_WITH_CUDA
#include "prototype_shift.h"
#endif

namespace py = pybind11;

namespace pysteer {
namespace {

// From here on turning the prototypes over pays. Not a matter of the other rows, which must not change a bit of this
// one.
constexpr std::int64_t kFewestTokens = 16, kFewestPrototypes = 20;

struct PrototypeShift {
    Frame frame;
    const float *weight, *offset, *delta;
    std::int64_t prototypes;
    bool pull;
    std::vector<Row> rows;
    int threads;
    bool streaming;
    std::vector<std::int64_t> sets;   // that are in use, where there are panels
    std::vector<std::int64_t> place;  // of a set among them
    std::vector<float> panels;
    std::int64_t panels_of_set = 0;  // floats

    void plan_panels() {
        if (frame.tokens < kFewestTokens || prototypes < kFewestPrototypes) return;
        panels_of_set = PYSTEER_PICK(panels_size)(prototypes, frame.width);
        for (const Row& row : rows) {
            if (row.start == row.end) continue;
            if (row.set >= std::int64_t(place.size())) place.resize(row.set + 1, -1);
            if (place[row.set] >= 0) continue;
            place[row.set] = std::int64_t(sets.size());
            sets.push_back(row.set);
        }
        panels.resize(sets.size() * panels_of_set);
    }

    void pack(std::int64_t index) {
        const std::int64_t size = PYSTEER_PICK(panel_size)(), each = (prototypes + size - 1) / size;
        const std::int64_t number = index / each;
        PYSTEER_PICK(pack_panel)
        (weight + sets[number] * prototypes * frame.width, prototypes, frame.width, index % each,
         panels.data() + number * panels_of_set);
    }
    std::int64_t packs() const {
        const std::int64_t size = PYSTEER_PICK(panel_size)();
        return std::int64_t(sets.size()) * ((prototypes + size - 1) / size);
    }

    PrototypeSet set_of(const Row& row) const {
        const std::int64_t bank = row.set * prototypes;
        return {weight + bank * frame.width,
                offset + bank,
                delta + bank * frame.width,
                panels_of_set ? panels.data() + place[row.set] * panels_of_set : nullptr,
                frame.width,
                prototypes,
                row.strength,
                pull};
    }
};

template <class T>
void run(std::uintptr_t x_address, std::uintptr_t y_address, PrototypeShift& op) {
    const T* x = reinterpret_cast<const T*>(x_address);
    T* y = reinterpret_cast<T*>(y_address);
    const Frame& f = op.frame;
    const bool by_token = f.by_token();
    const auto shift_tokens = PYSTEER_PICK(prototype_tokens<T>);
    const auto shift_channels = PYSTEER_PICK(prototype_channels<T>);
    const std::int64_t blocks = (f.tokens + kBlock - 1) / kBlock, packs = op.packs();
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        std::vector<float> scratch(std::min(kBlock, f.tokens) * f.width);
        std::int32_t nearest[kBlock];
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < packs; ++i) op.pack(i);
#pragma omp for schedule(dynamic) nowait
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
            if (by_token) {
                shift_tokens(from + start * f.x_token, to + start * f.y_token, end - start, f.x_token, f.y_token,
                             op.set_of(row), op.streaming, scratch.data(), nearest);
            } else {
                shift_channels(from + start, to + start, end - start, f.x_channel, f.y_channel, op.set_of(row),
                               scratch.data(), nearest);
            }
        }
        if (op.streaming) finish_streams();
    }
}

int prototype_shift(std::uintptr_t x, std::uintptr_t y, std::uintptr_t weight, std::uintptr_t offset,
                    std::uintptr_t delta, std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock,
                    std::uintptr_t span, std::int64_t rows, std::int64_t tokens, std::int64_t width, std::int64_t x_row,
                    std::int64_t x_token, std::int64_t x_channel, std::int64_t y_row, std::int64_t y_token,
                    std::int64_t y_channel, std::int64_t sets, std::int64_t prototypes, std::int64_t steps,
                    std::int64_t capacity, std::int64_t pull, std::int64_t dtype, std::int64_t threads) {
    const py::gil_scoped_release release;
    PrototypeShift op;
    op.frame = {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel};
    op.weight = reinterpret_cast<const float*>(weight);
    op.offset = reinterpret_cast<const float*>(offset);
    op.delta = reinterpret_cast<const float*>(delta);
    op.prototypes = prototypes;
    op.pull = pull != 0;
    const Table table = table_at(slot, strength, clock, span, sets, steps, capacity);
    if (const Status status = read_rows(table, op.frame, op.rows)) return status;
    op.plan_panels();
    const DType type = DType(dtype);
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    op.threads = threads_for(bytes * std::max<std::int64_t>(prototypes / 8, 1), threads);
    op.streaming = worth_streaming(reinterpret_cast<void*>(x), reinterpret_cast<void*>(y), bytes);
    if (type == DType::float32) run<float>(x, y, op);
    if (type == DType::bfloat16) run<BFloat16>(x, y, op);
    if (type == DType::float16) run<Float16>(x, y, op);
    return ok;
}

void register_prototype_shift(py::module_& m) {
    def_kernel<&prototype_shift>(
        m, "prototype_shift", "prototype_shift on the CPU, K >= 1; returns 0, 1 (clock outside) or 2 (slot outside).");
#ifdef PYSTEER_WITH_CUDA
    m.def("prototype_shift_cuda", &prototype_shift_cuda, "prototype_shift on the current CUDA device.");
#endif
}

PYSTEER_REGISTER_OP(register_prototype_shift)

}  // namespace
}  // namespace pysteer
