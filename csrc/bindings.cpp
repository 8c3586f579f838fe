// The extension module pysteer._C: what it was built with, what it found at run time, and the ops (registry.h).

#include <pybind11/pybind11.h>

#include <string>

#include "cpu_features.h"
#include "dtype.h"
#include "registry.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef PYSTEER_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
    return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
    return std::string("gcc ") + __VERSION__;
#else
    return "unknown";
#endif
}

int openmp_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 0;
#endif
}

py::dict build_info() {
    py::dict info;
    info["version"] = PYSTEER_VERSION;
    info["compiler"] = compiler();
#ifdef PYSTEER_WITH_CUDA
    info["has_cuda"] = true;
    info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    info["cuda_architectures"] = PYSTEER_CUDA_ARCHITECTURES;
#else
    info["has_cuda"] = false;
    info["cuda_version"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
    info["openmp_threads"] = openmp_threads();
    return info;
}

py::dict cpu_features() {
    const auto& found = pysteer::cpu_features();
    py::dict features;
    features["avx2"] = found.avx2;
    features["avx512f"] = found.avx512f;
    features["avx512_bf16"] = found.avx512_bf16;
    features["amx"] = found.amx;
    return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of pysteer. Arguments are raw addresses; call them through pysteer.ops.";
    m.attr("__version__") = PYSTEER_VERSION;
#ifdef PYSTEER_WITH_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif
    py::dict dtypes;
    dtypes["float32"] = static_cast<std::int64_t>(pysteer::DType::float32);
    dtypes["bfloat16"] = static_cast<std::int64_t>(pysteer::DType::bfloat16);
    dtypes["float16"] = static_cast<std::int64_t>(pysteer::DType::float16);
    m.attr("DTYPES") = dtypes;
    m.def("build_info", &build_info, "What the extension was built with, and the OpenMP threads in use.");
    m.def("cpu_features", &cpu_features, "Instruction sets of this processor that the kernels choose between.");
    for (const auto function : pysteer::op_registers()) function(m);
}
