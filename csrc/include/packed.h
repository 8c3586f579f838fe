// Kernels as plain function pointers over an array of words, so that a call can be kept and made again without Python
// objects in between (repeats.cpp).
//
//     def_kernel<&my_op>(m, "my_op", "what it does");
//
// binds `int my_op(...)` like `m.def` and leaves a capsule `my_op_packed` beside it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

namespace pysteer {

union Word {
    std::int64_t integer;
    double real;
};

struct PackedKernel {
    int (*run)(const Word*);
    std::size_t count;
    const bool* is_real;  // of each argument

    static constexpr const char* kCapsule = "pysteer.packed_kernel";
};

template <class A>
A word_as(const Word& word) {
    if constexpr (std::is_floating_point_v<A>) {
        return A(word.real);
    } else {
        return A(word.integer);
    }
}

template <auto function>
struct Packed;

template <class... A, int (*function)(A...)>
struct Packed<function> {
    template <std::size_t... i>
    static int spread(const Word* words, std::index_sequence<i...>) {
        return function(word_as<A>(words[i])...);
    }
    static int run(const Word* words) { return spread(words, std::index_sequence_for<A...>{}); }

    static constexpr bool is_real[] = {std::is_floating_point_v<A>...};
    static inline PackedKernel kernel{&run, sizeof...(A), is_real};
};

template <auto function>
void def_kernel(pybind11::module_& m, const char* name, const char* doc) {
    m.def(name, function, doc);
    const std::string beside = std::string(name) + "_packed";
    m.attr(beside.c_str()) = pybind11::capsule(&Packed<function>::kernel, PackedKernel::kCapsule);
}

}  // namespace pysteer
