// linear_shift in bfloat16 where the processor multiplies it, on the tiles of AMX or with the dot products of AVX-512:
// sums, the bias of the layer and the shift in fp32, rounded once.
//
// The rows of the weight are read where they lie in memory; the tokens are packed once, in panels of 48. Threads share
// out the rows of the weight. Every output of a token is added up in the same order whatever tokens stand beside it.

#include <vector>

#include "panels.h"
#include "registry.h"
#include "steering_call.h"

namespace pysteer {
namespace {

struct LinearShift {
    const BFloat16 *weight, *linear_bias;
    BFloat16* y;
    const float *gain, *bias;
    const Row* rows;
    std::int64_t row_count, tokens, width, outputs, weight_stride;
};

}  // namespace
}  // namespace pysteer

#define PYSTEER_WITH_AMX
#define PYSTEER_KERNEL "linear_shift.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kTokensOfPanel = 48, kRowsOfTile = 32;
constexpr std::int64_t kGroupBytes = 1 << 20;  // of panels that stay in the second cache while the weight passes by

int linear_shift(std::uintptr_t x, std::uintptr_t y, std::uintptr_t weight, std::uintptr_t linear_bias,
                 std::uintptr_t gain, std::uintptr_t bias, std::uintptr_t slot, std::uintptr_t strength,
                 std::uintptr_t clock, std::uintptr_t span, std::int64_t rows, std::int64_t tokens, std::int64_t width,
                 std::int64_t outputs, std::int64_t weight_stride, std::int64_t sets, std::int64_t steps,
                 std::int64_t capacity, std::int64_t threads) {
    const py::gil_scoped_release release;
    const Table table = table_at(slot, strength, clock, span, sets, steps, capacity);
    std::vector<Row> found;
    const Frame frame{rows, tokens, outputs, 0, 0, 1, 0, 0, 1};
    if (const Status status = read_rows(table, frame, found)) return status;
    const LinearShift op{reinterpret_cast<const BFloat16*>(weight),
                         reinterpret_cast<const BFloat16*>(linear_bias),
                         reinterpret_cast<BFloat16*>(y),
                         reinterpret_cast<const float*>(gain),
                         reinterpret_cast<const float*>(bias),
                         found.data(),
                         rows,
                         tokens,
                         width,
                         outputs,
                         weight_stride};
    const BFloat16* from = reinterpret_cast<const BFloat16*>(x);
    const std::int64_t all = rows * tokens, panels = ceil_div(all, kTokensOfPanel);
    const std::int64_t size = kTokensOfPanel * (width / 2);
    const Buffer<std::uint32_t> packed(panels * size);
    const std::int64_t together = std::max<std::int64_t>(kGroupBytes / (4 * size), 1) * kTokensOfPanel;
    const std::int64_t groups = ceil_div(all, together), blocks = ceil_div(outputs, kRowsOfTile);
    const int team = threads_for_products(all * width * outputs, threads);
#pragma omp parallel num_threads(team) if (team > 1)
    {
        const Buffer<BFloat16> spare(kRowsOfTile * width);
        PYSTEER_PICK(start_tiles)();
#pragma omp for schedule(static)
        for (std::int64_t p = 0; p < panels; ++p) {
            const std::int64_t first = p * kTokensOfPanel;
            PYSTEER_PICK(pack_some)
            (from + first * width, width, std::min(kTokensOfPanel, all - first), width, packed.get() + p * size);
        }
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < groups * blocks; ++i) {
            const std::int64_t begin = i / blocks * together, end = std::min(begin + together, all);
            PYSTEER_PICK(rows_of_weight)(op, i % blocks * kRowsOfTile, begin, end, packed.get(), spare.get());
        }
        PYSTEER_PICK(finish_tiles)();
    }
    return ok;
}

void register_linear_shift(py::module_& m) {
    m.def(
        "linear_shift", &linear_shift,
        "linear_shift in bfloat16 on the CPU, width a multiple of 32, tokens one after the other; returns 0, 1 (clock "
        "outside) or 2 (slot outside).");
    m.def(
        "linear_shift_serves", [] { return PYSTEER_PICK(multiplies)(); },
        "Whether this processor multiplies bfloat16.");
}

PYSTEER_REGISTER_OP(register_linear_shift)

}  // namespace
}  // namespace pysteer
