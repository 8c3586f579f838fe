// sae_decode and its gradients on the CPU: tokens, or latents, are split over threads; inner loops in
// sae_decode.simd.h.

#include <atomic>
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "registry.h"
#include "steering_call.h"

#define PYSTEER_KERNEL "sae_decode.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

// Active latents of a number of tokens.
struct Codes {
    std::uintptr_t values;
    DType type;
    const std::int32_t* indices;
    std::int64_t tokens, count;
};

struct Matrix {
    std::uintptr_t address;
    std::int64_t rows, width, stride;
};

template <class T>
const T* at(std::uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

float value_at(const Codes& codes, std::int64_t i) {
    if (codes.type == DType::bfloat16) return to_float(at<BFloat16>(codes.values)[i]);
    if (codes.type == DType::float16) return to_float(at<Float16>(codes.values)[i]);
    return at<float>(codes.values)[i];
}

// Calls function with an element of the type that the code names.
template <class Function>
void with_type(DType type, const Function& function) {
    if (type == DType::float32) function(float{});
    if (type == DType::bfloat16) function(BFloat16{});
    if (type == DType::float16) function(Float16{});
}

template <class W, class Y>
bool decode(const Codes& codes, const Matrix& decoder, std::uintptr_t bias, std::uintptr_t residual, std::uintptr_t y,
            int threads) {
    const auto sum = PYSTEER_PICK(sum_rows<W, Y>);
    std::atomic<bool> outside{false};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> weights(codes.count), sums(decoder.width);
        std::vector<std::int32_t> index(codes.count);
#pragma omp for schedule(dynamic, 4)
        for (std::int64_t t = 0; t < codes.tokens; ++t) {
            int count = 0;
            for (std::int64_t i = t * codes.count; i < (t + 1) * codes.count; ++i) {
                const std::int32_t latent = codes.indices[i];
                if (latent < -1 || latent >= decoder.rows) outside = true;
                if (latent < 0 || latent >= decoder.rows) continue;
                weights[count] = value_at(codes, i);
                index[count++] = latent;
            }
            const std::int64_t place = t * decoder.width;
            sum(weights.data(), index.data(), count, at<W>(decoder.address), decoder.stride, decoder.width,
                at<float>(bias), residual ? at<Y>(residual) + place : nullptr, sums.data(),
                reinterpret_cast<Y*>(y) + place);
        }
    }
    return outside;
}

int sae_decode(std::uintptr_t values, std::uintptr_t indices, std::uintptr_t decoder, std::uintptr_t bias,
               std::uintptr_t residual, std::uintptr_t y, std::int64_t tokens, std::int64_t count, std::int64_t latents,
               std::int64_t width, std::int64_t stride, std::int64_t values_type, std::int64_t decoder_type,
               std::int64_t type, std::int64_t threads) {
    const py::gil_scoped_release release;
    const Codes codes{values, DType(values_type), at<std::int32_t>(indices), tokens, count};
    const Matrix matrix{decoder, latents, width, stride};
    const int split = threads_for(tokens * count * width * element_size(DType(decoder_type)), threads);
    bool outside = false;
    with_type(DType(decoder_type), [&](auto w) {
        with_type(DType(type), [&](auto element) {
            outside = decode<decltype(w), decltype(element)>(codes, matrix, bias, residual, y, split);
        });
    });
    return outside;
}

template <class G, class W>
void values_backward(std::uintptr_t gradient, const Codes& codes, const Matrix& decoder, float* out, int threads) {
    const auto dots = PYSTEER_PICK(dot_rows<G, W>);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> scratch(decoder.width);
        std::vector<std::int32_t> index(codes.count);
#pragma omp for schedule(dynamic, 4)
        for (std::int64_t t = 0; t < codes.tokens; ++t) {
            for (std::int64_t i = 0; i < codes.count; ++i) {
                const std::int32_t latent = codes.indices[t * codes.count + i];
                index[i] = latent < decoder.rows ? latent : -1;
            }
            dots(at<G>(gradient) + t * decoder.width, index.data(), int(codes.count), at<W>(decoder.address),
                 decoder.stride, decoder.width, scratch.data(), out + t * codes.count);
        }
    }
}

void sae_decode_values_backward(std::uintptr_t gradient, std::uintptr_t indices, std::uintptr_t decoder,
                                std::uintptr_t out, std::int64_t tokens, std::int64_t count, std::int64_t latents,
                                std::int64_t width, std::int64_t stride, std::int64_t type, std::int64_t decoder_type,
                                std::int64_t threads) {
    const py::gil_scoped_release release;
    const Codes codes{0, DType::float32, at<std::int32_t>(indices), tokens, count};
    const Matrix matrix{decoder, latents, width, stride};
    const int split = threads_for(tokens * count * width * element_size(DType(decoder_type)), threads);
    with_type(DType(type), [&](auto g) {
        with_type(DType(decoder_type), [&](auto w) {
            values_backward<decltype(g), decltype(w)>(gradient, codes, matrix, reinterpret_cast<float*>(out), split);
        });
    });
}

// For every latent the tokens that use it, in their order, and with which values.
struct Uses {
    std::vector<std::int64_t> first;  // [latents + 1]
    std::vector<std::int32_t> token;
    std::vector<float> value;

    Uses(const Codes& codes, std::int64_t latents) : first(latents + 1) {
        const std::int64_t all = codes.tokens * codes.count;
        const auto known = [&](std::int64_t i) { return codes.indices[i] >= 0 && codes.indices[i] < latents; };
        for (std::int64_t i = 0; i < all; ++i) {
            if (known(i)) ++first[codes.indices[i] + 1];
        }
        for (std::int64_t m = 0; m < latents; ++m) first[m + 1] += first[m];
        token.resize(first[latents]);
        value.resize(first[latents]);
        std::vector<std::int64_t> next(first.begin(), first.end() - 1);
        for (std::int64_t i = 0; i < all; ++i) {
            if (!known(i)) continue;
            const std::int64_t place = next[codes.indices[i]]++;
            token[place] = std::int32_t(i / codes.count);
            value[place] = value_at(codes, i);
        }
    }
};

template <class G, class W>
void weight_backward(std::uintptr_t gradient, const Uses& uses, std::int64_t latents, std::int64_t width, W* out,
                     int threads) {
    const auto sum = PYSTEER_PICK(sum_rows<G, W>);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> sums(width);
#pragma omp for schedule(dynamic, 16)
        for (std::int64_t m = 0; m < latents; ++m) {
            const std::int64_t begin = uses.first[m], end = uses.first[m + 1];
            if (begin == end) {
                std::memset(out + m * width, 0, width * sizeof(W));
            } else {
                sum(uses.value.data() + begin, uses.token.data() + begin, int(end - begin), at<G>(gradient), width,
                    width, nullptr, nullptr, sums.data(), out + m * width);
            }
        }
    }
}

void sae_decode_weight_backward(std::uintptr_t gradient, std::uintptr_t values, std::uintptr_t indices,
                                std::uintptr_t out, std::int64_t tokens, std::int64_t count, std::int64_t latents,
                                std::int64_t width, std::int64_t type, std::int64_t values_type,
                                std::int64_t decoder_type, std::int64_t threads) {
    const py::gil_scoped_release release;
    const Uses uses({values, DType(values_type), at<std::int32_t>(indices), tokens, count}, latents);
    const int split = threads_for(latents * width * element_size(DType(decoder_type)), threads);
    with_type(DType(type), [&](auto g) {
        with_type(DType(decoder_type), [&](auto w) {
            using W = decltype(w);
            weight_backward<decltype(g), W>(gradient, uses, latents, width, reinterpret_cast<W*>(out), split);
        });
    });
}

void register_sae_decode(py::module_& m) {
    m.def("sae_decode", &sae_decode, "sae_decode on the CPU; returns 1 where an index is outside, else 0.");
    m.def("sae_decode_values_backward", &sae_decode_values_backward, "Gradient of sae_decode in its values, in fp32.");
    m.def("sae_decode_weight_backward", &sae_decode_weight_backward, "Gradient of sae_decode in its decoder.");
}

PYSTEER_REGISTER_OP(register_sae_decode)

}  // namespace
}  // namespace pysteer
