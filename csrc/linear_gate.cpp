// linear_gate on the CPU: the means of the rows in one read of x (row_sums.h), then a gate for each. The inner loops
// are in linear_gate.simd.h.

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
#include "row_sums.h"

namespace py = pybind11;

namespace pysteer {
namespace {

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
    const std::vector<float> means = means_of(x, type, s);
    std::vector<float> spare(width);
    const auto gate = PYSTEER_PICK(gate_of);
    float* gates = reinterpret_cast<float*>(out);
    for (std::int64_t r = 0; r < rows; ++r) {
        gates[r] = s.counted(r) > 0 ? gate(means.data() + r * width, call, spare.data()) : 0.0f;
    }
}

void register_linear_gate(py::module_& m) {
    m.def("linear_gate", &linear_gate, "linear_gate of rows on the CPU; a threshold below 0 is none.");
}

PYSTEER_REGISTER_OP(register_linear_gate)

}  // namespace
}  // namespace pysteer
