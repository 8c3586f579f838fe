// quadratic_distance on the CPU: what surrounds its matrix product, each in one pass. The product itself is torch's.
//
// First: the middle of the centres, and the vectors that tokens are multiplied with: w_k = P_k (m_k - middle) / c, then
// the directions Z. Before: tokens less the middle of the centres in fp32, and their squares. After: the squared
// distances, from the products with the vectors w_k and with the directions Z. Under a dense P the squares are
// x . Px, one pass over what torch multiplied. The inner loops are in quadratic_distance.simd.h.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "registry.h"
#include "steering_call.h"

#define PYSTEER_KERNEL "quadratic_distance.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

template <class T>
void center(std::uintptr_t x, const float* middle, float* out, float* squares, std::int64_t tokens, std::int64_t width,
            std::int64_t x_token, int threads) {
    const T* from = reinterpret_cast<const T*>(x);
    const auto one = PYSTEER_PICK(center_token<T>);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (std::int64_t t = 0; t < tokens; ++t) squares[t] = one(from + t * x_token, middle, out + t * width, width);
}

void center_tokens(std::uintptr_t x, std::uintptr_t middle, std::uintptr_t out, std::uintptr_t squares,
                   std::int64_t tokens, std::int64_t width, std::int64_t x_token, std::int64_t dtype,
                   std::int64_t threads) {
    const py::gil_scoped_release release;
    const DType type = DType(dtype);
    const int count = threads_for(tokens * width * element_size(type), threads);
    const float* m = reinterpret_cast<const float*>(middle);
    float *y = reinterpret_cast<float*>(out), *s = reinterpret_cast<float*>(squares);
    if (type == DType::float32) center<float>(x, m, y, s, tokens, width, x_token, count);
    if (type == DType::bfloat16) center<BFloat16>(x, m, y, s, tokens, width, x_token, count);
    if (type == DType::float16) center<Float16>(x, m, y, s, tokens, width, x_token, count);
}

// centre: [count, width]; factor: [rank, width], or [count, rank, width] when `own`; vectors: [count + directions,
// width], where every centre has directions, first those that are the first of theirs. offset: m_k . w_k
void prepare_centres(std::uintptr_t centre, std::uintptr_t factor, std::uintptr_t middle, std::uintptr_t vectors,
                     std::uintptr_t offset, std::int64_t count, std::int64_t rank, std::int64_t width, bool own) {
    const py::gil_scoped_release release;
    const float *centres = reinterpret_cast<const float*>(centre), *z = reinterpret_cast<const float*>(factor);
    float *mean = reinterpret_cast<float*>(middle), *w = reinterpret_cast<float*>(vectors);
    float* offsets = reinterpret_cast<float*>(offset);
    std::fill(mean, mean + width, 0.0f);
    for (std::int64_t k = 0; k < count; ++k) {
        for (std::int64_t d = 0; d < width; ++d) mean[d] += centres[k * width + d];
    }
    for (std::int64_t d = 0; d < width; ++d) mean[d] /= float(count);
    std::vector<float> m(width);
    for (std::int64_t k = 0; k < count; ++k) {
        for (std::int64_t d = 0; d < width; ++d) m[d] = centres[k * width + d] - mean[d];
        offsets[k] =
            PYSTEER_PICK(apply_precision)(m.data(), z + (own ? k * rank * width : 0), rank, width, w + k * width);
    }
    for (std::int64_t i = 0; i < (own ? count * rank : rank); ++i) {
        const std::int64_t to = own ? i % rank * count + i / rank : i;
        std::copy_n(z + i * width, width, w + (count + to) * width);
    }
}

// squares[t] = x_t . (P x)_t of centred tokens and their products with a dense matrix.
void square_by_products(std::uintptr_t tokens, std::uintptr_t products, std::uintptr_t squares, std::int64_t count,
                        std::int64_t width, std::int64_t threads) {
    const py::gil_scoped_release release;
    const float *x = reinterpret_cast<const float*>(tokens), *p = reinterpret_cast<const float*>(products);
    float* s = reinterpret_cast<float*>(squares);
    const int number = threads_for(count * width * 8, threads);
    const auto one = PYSTEER_PICK(product);
#pragma omp parallel for num_threads(number) if (number > 1)
    for (std::int64_t t = 0; t < count; ++t) s[t] = one(x + t * width, p + t * width, width);
}

// products: [tokens, count + directions], then [rank], or [rank, count] when `own`; scale: [1] or [count] or none.
void join_distances(std::uintptr_t products, std::uintptr_t squares, std::uintptr_t offset, std::uintptr_t scale,
                    std::uintptr_t out, std::int64_t tokens, std::int64_t count, std::int64_t rank, bool own,
                    bool scale_each, std::int64_t threads) {
    const py::gil_scoped_release release;
    const std::int64_t columns = count + (own ? count * rank : rank);
    const float* p = reinterpret_cast<const float*>(products);
    const float* s = reinterpret_cast<const float*>(squares);
    const float *o = reinterpret_cast<const float*>(offset), *c = reinterpret_cast<const float*>(scale);
    float* y = reinterpret_cast<float*>(out);
    const int number = threads_for(tokens * columns * 4, threads);
    const auto one = PYSTEER_PICK(join_token);
#pragma omp parallel for num_threads(number) if (number > 1)
    for (std::int64_t t = 0; t < tokens; ++t) {
        one(p + t * columns, s[t], o, c, scale_each, y + t * count, count, rank, own);
    }
}

void register_quadratic_distance(py::module_& m) {
    m.def(
        "quadratic_distance_centres", &prepare_centres,
        "The middle of the centres, the vectors that tokens are multiplied with, and the constants of the distances.");
    m.def("quadratic_distance_tokens", &center_tokens,
          "Tokens less a vector in fp32, and the squares of what is left.");
    m.def("quadratic_distance_squares", &square_by_products, "Squares of tokens under a dense matrix.");
    m.def("quadratic_distance", &join_distances, "Squared distances from the products of centred tokens.");
}

PYSTEER_REGISTER_OP(register_quadratic_distance)

}  // namespace
}  // namespace pysteer
