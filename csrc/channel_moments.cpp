// channel_moments on the CPU: x is cut into blocks that depend on its shape alone, partial results are merged in order.
// The inner loops are in channel_moments.simd.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "dtype.h"
#include "registry.h"

namespace pysteer {
namespace {

// A piece of one channel: rows by tokens.
struct Block {
    std::int64_t rows, tokens, row_stride, token_stride;
};

// Bits of the smallest size that is not near zero.
struct Limits {
    std::uint32_t near;
};

// Statistics of one block of one channel.
struct ChannelBlock {
    double mean, m2, mean_abs, near, zero;
    float minimum, maximum, smallest;
    bool settled;
};

// mean^2 / variance above which fp32 sums of squares are taken around the mean: they lose two bits or so at most.
constexpr double kFarFromZero = 4;

}  // namespace
}  // namespace pysteer

#define PYSTEER_KERNEL "channel_moments.simd.h"
#include "each_isa.h"

#include "steering_call.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kTile = 4096;       // channels that are walked together
constexpr std::int64_t kChunk = 1024;      // tokens of one block of such channels
constexpr std::int64_t kPlane = 8192;      // elements of one block of a channel whose tokens are neighbours
constexpr std::int64_t kPieces = 64;       // pieces of work, where there are enough blocks
constexpr std::int64_t kLargestStep = 32;  // elements, of any instruction set

// Moments of many channels: count, mean, m2, minimum, maximum, mean_abs, near_zero, zero.
struct Moments {
    double* rows[8];

    void clear(std::int64_t d) const {
        constexpr double start[8] = {0, 0, 0, HUGE_VAL, -HUGE_VAL, 0, 0, 0};
        for (int k = 0; k < 8; ++k) rows[k][d] = start[k];
    }

    // The values of n further elements; shares is {n_a / n, n_b / n}.
    void take(std::int64_t d, double n, const double* shares, const double (&b)[7]) const {
        const double difference = b[0] - rows[1][d];
        rows[2][d] += b[1] + difference * difference * (n * shares[0]);
        rows[1][d] = rows[1][d] * shares[0] + b[0] * shares[1];
        rows[3][d] = b[2] < rows[3][d] || b[2] != b[2] ? b[2] : rows[3][d];
        rows[4][d] = b[3] > rows[4][d] || b[3] != b[3] ? b[3] : rows[4][d];
        rows[5][d] = rows[5][d] * shares[0] + b[4] * shares[1];
        rows[6][d] += b[5];
        rows[7][d] += b[6];
        rows[0][d] += n;
    }

    void take(std::int64_t d, double n, const double* shares, const ChannelBlock& b) const {
        take(d, n, shares, {b.mean, b.m2, b.minimum, b.maximum, b.mean_abs, b.near, b.zero});
    }

    void take(std::int64_t d, const Moments& from, std::int64_t e) const {
        const double n = from.rows[0][e], all = rows[0][d] + n;
        if (n == 0) return;
        const double shares[2] = {rows[0][d] / all, n / all};
        take(d, n, shares,
             {from.rows[1][e], from.rows[2][e], from.rows[3][e], from.rows[4][e], from.rows[5][e], from.rows[6][e],
              from.rows[7][e]});
    }
};

// [8, width] doubles for every piece.
struct Partials {
    std::vector<double> values;
    std::int64_t width;

    Partials(std::int64_t pieces, std::int64_t width) : values(pieces * 8 * width), width(width) {}
    Moments at(std::int64_t piece) {
        Moments m;
        for (int k = 0; k < 8; ++k) m.rows[k] = values.data() + (piece * 8 + k) * width;
        return m;
    }
};

struct Walk {
    std::int64_t rows, tokens, width, row, token, channel;
    Limits limits;
    int threads;
};

std::int64_t first_of(std::int64_t piece, std::int64_t pieces, std::int64_t blocks) { return blocks * piece / pieces; }

void merge(Partials& partials, std::int64_t pieces, std::int64_t width, const Moments& out) {
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
        const Moments from = partials.at(piece);
        for (std::int64_t d = 0; d < width; ++d) out.take(d, from, d);
    }
}

// Tokens next to each other: a piece of work is a part of the blocks of one channel.
template <class T>
void by_channel(const T* x, const Walk& w, const Moments& out) {
    const auto moments = PYSTEER_PICK(moments_plane<T>);
    const std::int64_t together = w.tokens < kPlane ? std::min(kPlane / w.tokens, w.rows) : 1;  // rows of a block
    const std::int64_t parts = (w.tokens + kPlane - 1) / kPlane;
    const std::int64_t blocks = (w.rows + together - 1) / together * parts;
    const std::int64_t pieces = std::min(blocks, (kPieces + w.width - 1) / w.width);
    Partials partials(pieces, w.width);
#pragma omp parallel for schedule(static) num_threads(w.threads) if (w.threads > 1)
    for (std::int64_t i = 0; i < w.width * pieces; ++i) {
        const std::int64_t d = i / pieces, piece = i % pieces;
        const Moments into = partials.at(piece);
        into.clear(d);
        double count = 0;
        for (std::int64_t b = first_of(piece, pieces, blocks); b < first_of(piece + 1, pieces, blocks); ++b) {
            const std::int64_t r = b / parts * together, t = b % parts * kPlane;
            const Block block{std::min(together, w.rows - r), std::min(kPlane, w.tokens - t), w.row, w.token};
            const double n = double(block.rows * block.tokens), shares[2] = {count / (count + n), n / (count + n)};
            ChannelBlock found;
            moments(x + r * w.row + t * w.token + d * w.channel, block, w.limits, &found);
            into.take(d, n, shares, found);
            count += n;
        }
    }
    merge(partials, pieces, w.width, out);
}

// What one thread needs to walk a tile of channels.
template <class T>
struct Scratch {
    std::vector<float> sums = std::vector<float>(3 * kTile + 3 * kLargestStep);
    std::vector<std::uint32_t> order = std::vector<std::uint32_t>(3 * kTile + 3 * kLargestStep);
    std::vector<ChannelBlock> found = std::vector<ChannelBlock>(kTile + kLargestStep);
    std::vector<T> rest = std::vector<T>(kChunk * kLargestStep);
};

// A chunk of tokens of one tile; the channels that do not fill a step are copied together.
template <class T>
void tile(const T* x, std::int64_t stride, std::int64_t tokens, std::int64_t width, const Limits& limits,
          Scratch<T>& scratch) {
    const auto moments = PYSTEER_PICK(moments_tokens<T>);
    const std::int64_t step = PYSTEER_PICK(moments_step)();
    const std::int64_t steps = width / step, rest = width % step;
    if (steps)
        moments(x, stride, tokens, steps, limits, scratch.sums.data(), scratch.order.data(), scratch.found.data());
    if (!rest) return;
    for (std::int64_t t = 0; t < tokens; ++t) {
        T* to = scratch.rest.data() + t * step;
        std::copy_n(x + t * stride + steps * step, rest, to);
        std::fill(to + rest, to + step, T{});
    }
    moments(scratch.rest.data(), step, tokens, 1, limits, scratch.sums.data(), scratch.order.data(),
            scratch.found.data() + steps * step);
}

// Channels next to each other: a piece of work is a part of the chunks of one tile of channels.
template <class T>
void by_token(const T* x, Walk w, const Moments& out) {
    if (w.row == w.tokens * w.token || w.tokens == 1) {
        w.token = w.tokens == 1 ? w.row : w.token;
        w.tokens *= w.rows;
        w.rows = 1;
    }
    const std::int64_t tiles = (w.width + kTile - 1) / kTile, parts = (w.tokens + kChunk - 1) / kChunk;
    const std::int64_t chunks = w.rows * parts, pieces = std::min(chunks, (kPieces + tiles - 1) / tiles);
    Partials partials(pieces, w.width);
#pragma omp parallel num_threads(w.threads) if (w.threads > 1)
    {
        Scratch<T> scratch;
#pragma omp for schedule(static) nowait
        for (std::int64_t i = 0; i < tiles * pieces; ++i) {
            const std::int64_t piece = i / tiles, d = i % tiles * kTile, width = std::min(kTile, w.width - d);
            const Moments into = partials.at(piece);
            for (std::int64_t k = 0; k < width; ++k) into.clear(d + k);
            double count = 0;
            for (std::int64_t c = first_of(piece, pieces, chunks); c < first_of(piece + 1, pieces, chunks); ++c) {
                const std::int64_t t = c % parts * kChunk, tokens = std::min(kChunk, w.tokens - t);
                const double n = double(tokens), shares[2] = {count / (count + n), n / (count + n)};
                tile(x + c / parts * w.row + t * w.token + d, w.token, tokens, width, w.limits, scratch);
                for (std::int64_t k = 0; k < width; ++k) into.take(d + k, n, shares, scratch.found[k]);
                count += n;
            }
        }
    }
    merge(partials, pieces, w.width, out);
}

template <class T>
void run(std::uintptr_t address, const Walk& w, const Moments& out) {
    const T* x = reinterpret_cast<const T*>(address);
    if (w.channel == 1 || w.width == 1) {
        by_token(x, w, out);
    } else {
        by_channel(x, w, out);
    }
}

// Elements whose bits without the sign are below this are below eps.
std::uint32_t near_bits(float eps, DType dtype) {
    if (dtype == DType::float32) return bits_of(eps);
    std::uint32_t low = 0, high = dtype == DType::bfloat16 ? 0x7f81u : 0x7c01u;  // behind infinity
    while (low < high) {
        const std::uint16_t middle = std::uint16_t((low + high) / 2);
        const float value = dtype == DType::bfloat16 ? to_float(BFloat16{middle}) : to_float(Float16{middle});
        if (value < eps) {
            low = middle + 1u;
        } else {
            high = middle;
        }
    }
    return low;
}

void channel_moments(std::uintptr_t x, std::uintptr_t out, std::int64_t rows, std::int64_t tokens, std::int64_t width,
                     std::int64_t x_row, std::int64_t x_token, std::int64_t x_channel, double eps,
                     std::int64_t accumulate, std::int64_t dtype, std::int64_t threads) {
    const py::gil_scoped_release release;
    const DType type = DType(dtype);
    Moments moments;
    for (int k = 0; k < 8; ++k) moments.rows[k] = reinterpret_cast<double*>(out) + k * width;
    for (std::int64_t d = 0; !accumulate && d < width; ++d) moments.clear(d);
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    const Walk walk{
        rows, tokens, width, x_row, x_token, x_channel, {near_bits(float(eps), type)}, threads_for(bytes, threads)};
    if (type == DType::float32) run<float>(x, walk, moments);
    if (type == DType::bfloat16) run<BFloat16>(x, walk, moments);
    if (type == DType::float16) run<Float16>(x, walk, moments);
}

void register_channel_moments(py::module_& m) {
    m.def("channel_moments", &channel_moments, "channel_moments on the CPU: [8, width] doubles, fresh or added to.");
}

PYSTEER_REGISTER_OP(register_channel_moments)

}  // namespace
}  // namespace pysteer
