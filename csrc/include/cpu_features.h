// What the processor that runs us can do, asked at run time: a wheel is built on one machine and used on another.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PYSTEER_X86 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pysteer {

struct CpuFeatures {
    bool avx2 = false;         // with FMA and F16C, as every processor that has AVX2 does
    bool avx512f = false;      // with BW, VL and DQ
    bool avx512_bf16 = false;  // conversion and dot product of bfloat16
    bool amx = false;          // tiles with bfloat16, allowed by the kernel
};

namespace detail {

#ifdef PYSTEER_X86
// Linux enables the AMX tile state per process, on request.
inline bool request_amx() {
    constexpr long arch_req_xcomp_perm = 0x1023;
    constexpr long tile_data = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, tile_data) == 0;
}

inline bool cpuid_bit(unsigned leaf, unsigned subleaf, char reg, int bit) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d)) return false;
    const unsigned value = reg == 'a' ? a : reg == 'b' ? b : reg == 'c' ? c : d;
    return (value >> bit) & 1u;
}
#endif

inline CpuFeatures detect() {
    CpuFeatures found;
#ifdef PYSTEER_X86
    __builtin_cpu_init();  // also checks that the operating system saves the wide registers
    found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_bit(1, 0, 'c', 29);
    found.avx512f = found.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    found.avx512_bf16 = found.avx512f && cpuid_bit(7, 1, 'a', 5);
    found.amx = found.avx512f && cpuid_bit(7, 0, 'd', 24) && cpuid_bit(7, 0, 'd', 22) && request_amx();
#endif
    return found;
}

}  // namespace detail

inline const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detail::detect();
    return features;
}

}  // namespace pysteer
