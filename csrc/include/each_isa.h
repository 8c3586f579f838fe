// Compiles a kernel once per instruction set and picks one at run time: a wheel built on one machine runs on another.
//
//     #define PYSTEER_KERNEL "affine_shift.simd.h"
//     #include "each_isa.h"
//     const auto run = PYSTEER_PICK(affine_shift);   // isa_avx512::affine_shift, isa_avx2::... or isa_base::...
//
// Everything in it has internal linkage: files of several ops may use the same names, which the linker would merge
// without a word otherwise. The kernel file has no include guard, includes nothing, and sees pysteer::BFloat16 and the
// vectors of simd.h. A file that defines PYSTEER_WITH_AMX before is compiled for the tiles of AMX as well. The
// environment variable PYSTEER_ISA (base, avx2, avx512, avx512_bf16, amx) lowers the choice; it is read once.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu_features.h"
#include "element.h"

#ifdef PYSTEER_X86
#if !defined(__clang__)  // gcc's own header starts some vectors from themselves on purpose
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#if defined(__clang__)
#define PYSTEER_TARGET_AVX2 \
    _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define PYSTEER_TARGET_AVX512                                                                                  \
    _Pragma(                                                                                                   \
        "clang attribute push(__attribute__((target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq\"))), " \
        "apply_to = function)")
#define PYSTEER_TARGET_AVX512_BF16                                                                              \
    _Pragma(                                                                                                    \
        "clang attribute push("                                                                                 \
        "__attribute__((target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16\"))), apply_to = " \
        "function)")
#define PYSTEER_TARGET_AMX                                                                                  \
    _Pragma(                                                                                                \
        "clang attribute push("                                                                             \
        "__attribute__((target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-" \
        "bf16\"))), apply_to = function)")
#define PYSTEER_TARGET_END _Pragma("clang attribute pop")
#else
#define PYSTEER_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define PYSTEER_TARGET_AVX512 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq\")")
#define PYSTEER_TARGET_AVX512_BF16 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16\")")
#define PYSTEER_TARGET_AMX      \
    _Pragma("GCC push_options") \
        _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16\")")
#define PYSTEER_TARGET_END _Pragma("GCC pop_options")
#endif

namespace pysteer {

#define PYSTEER_ISA_LEVEL 0
namespace isa_base {
namespace {
#include "simd.h"
#include PYSTEER_KERNEL
}  // namespace
}  // namespace isa_base
#undef PYSTEER_ISA_LEVEL

#ifdef PYSTEER_X86
PYSTEER_TARGET_AVX2
#define PYSTEER_ISA_LEVEL 2
namespace isa_avx2 {
namespace {
#include "simd.h"
#include PYSTEER_KERNEL
}  // namespace
}  // namespace isa_avx2
#undef PYSTEER_ISA_LEVEL
PYSTEER_TARGET_END

PYSTEER_TARGET_AVX512
#define PYSTEER_ISA_LEVEL 3
namespace isa_avx512 {
namespace {
#include "simd.h"
#include PYSTEER_KERNEL
}  // namespace
}  // namespace isa_avx512
#undef PYSTEER_ISA_LEVEL
PYSTEER_TARGET_END

PYSTEER_TARGET_AVX512_BF16
#define PYSTEER_ISA_LEVEL 4
namespace isa_avx512_bf16 {
namespace {
#include "simd.h"
#include PYSTEER_KERNEL
}  // namespace
}  // namespace isa_avx512_bf16
#undef PYSTEER_ISA_LEVEL
PYSTEER_TARGET_END

#ifdef PYSTEER_WITH_AMX
PYSTEER_TARGET_AMX
#define PYSTEER_ISA_LEVEL 5
namespace isa_amx {
namespace {
#include "simd.h"
#include PYSTEER_KERNEL
}  // namespace
}  // namespace isa_amx
#undef PYSTEER_ISA_LEVEL
PYSTEER_TARGET_END
#else
namespace isa_amx = isa_avx512_bf16;
#endif
#endif

namespace {

int isa_level() {
    static const int level = [] {
        const CpuFeatures& have = cpu_features();
        const int best = have.avx512_bf16 ? (have.amx ? 5 : 4) : have.avx512f ? 3 : have.avx2 ? 2 : 0;
        const char* asked = std::getenv("PYSTEER_ISA");
        const std::string name = asked ? asked : "";
        const int most = name == "base" ? 0 : name == "avx2" ? 2 : name == "avx512" ? 3 : name == "avx512_bf16" ? 4 : 5;
        return std::min(best, most);
    }();
    return level;
}

}  // namespace
}  // namespace pysteer

#ifdef PYSTEER_X86
#define PYSTEER_PICK(...)                                                    \
    (::pysteer::isa_level() == 5   ? ::pysteer::isa_amx::__VA_ARGS__         \
     : ::pysteer::isa_level() == 4 ? ::pysteer::isa_avx512_bf16::__VA_ARGS__ \
     : ::pysteer::isa_level() == 3 ? ::pysteer::isa_avx512::__VA_ARGS__      \
     : ::pysteer::isa_level() == 2 ? ::pysteer::isa_avx2::__VA_ARGS__        \
                                   : ::pysteer::isa_base::__VA_ARGS__)
#else
#define PYSTEER_PICK(...) ::pysteer::isa_base::__VA_ARGS__
#endif
