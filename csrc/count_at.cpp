// A count per step of the clock on the CPU: what an operator of torch would do, at a tenth of the cost of its call.

#include <cstdint>

#include "registry.h"

namespace pysteer {
namespace {

// Under the GIL, so that no two threads add at once. A step that is not counted is left to the op to complain about.
void count_at(std::uintptr_t counts, std::uintptr_t clock, std::int64_t steps, std::int64_t amount) {
    const std::int64_t step = *reinterpret_cast<const std::int64_t*>(clock);
    if (step >= 0 && step < steps) reinterpret_cast<std::int64_t*>(counts)[step] += amount;
}

void register_count_at(pybind11::module_& m) {
    m.def("count_at", &count_at, "Adds to the count of the current step, if there is one.");
}

PYSTEER_REGISTER_OP(register_count_at)

}  // namespace
}  // namespace pysteer
