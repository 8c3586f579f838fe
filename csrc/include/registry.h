// Ops announce themselves to the extension module, so that adding one is adding files and changing none.
//
// A file csrc/<op>.cpp defines `void register_<op>(pybind11::module_& m)` and then, at namespace scope,
//     PYSTEER_REGISTER_OP(register_<op>)
// Functions bound there take raw pointers as std::uintptr_t, sizes and strides as std::int64_t (in elements), a dtype
// code (dtype.h) and, for device code, the stream as std::uintptr_t. They release the GIL while they work.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace pysteer {

using Register = void (*)(pybind11::module_&);

// A function-local static: safe whatever order the object files are initialised in.
inline std::vector<Register>& op_registers() {
    static std::vector<Register> registers;
    return registers;
}

struct OpRegistration {
    explicit OpRegistration(Register function) { op_registers().push_back(function); }
};

}  // namespace pysteer

#define PYSTEER_REGISTER_OP(function) static const ::pysteer::OpRegistration pysteer_registration_##function{function};
