// channel_moments on the CPU: x is cut into blocks that depend on its shape alone, partial results are merged in order.
// The inner loops are in channel_moments.simd.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "dtype.h"
#include "packed.h"
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
    float minimum, maximum;
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

constexpr std::int64_t kTile = 512;        // channels that are walked together
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
};

// Room for [8, width] doubles for every piece, which whoever takes a piece fills; a single one goes where the result
// is.
class Partials {
 public:
    Partials(std::int64_t pieces, std::int64_t width, const Moments& out, bool fresh) : pieces_(pieces), width_(width) {
        start_ = out.rows[0];
        if (pieces == 1 && fresh) return;
        values_.reset(new double[pieces * 8 * width]);
        start_ = values_.get();
    }

    bool done() const { return !values_; }
    std::int64_t pieces() const { return pieces_; }
    Moments at(std::int64_t piece) const {
        Moments m;
        for (int k = 0; k < 8; ++k) m.rows[k] = start_ + (piece * 8 + k) * width_;
        return m;
    }

 private:
    std::int64_t pieces_, width_;
    std::unique_ptr<double[]> values_;
    double* start_;
};

struct Walk {
    std::int64_t rows, tokens, width, row, token, channel;
    Limits limits;
    int threads;
    bool fresh;  // nothing to add to
};

std::int64_t first_of(std::int64_t piece, std::int64_t pieces, std::int64_t blocks) { return blocks * piece / pieces; }

// Adds the pieces to `out` in order.
void merge(const Partials& partials, const Walk& w, const Moments& out) {
    if (partials.done()) return;
    const std::int64_t together = 256, blocks = (w.width + together - 1) / together;
#pragma omp parallel for schedule(static) \
    num_threads(w.threads) if (w.threads > 1 && partials.pieces() * w.width > 4096)
    for (std::int64_t i = 0; i < blocks; ++i) {
        const std::int64_t d = i * together, channels = std::min(together, w.width - d);
        for (std::int64_t k = d; w.fresh && k < d + channels; ++k) out.clear(k);
        for (std::int64_t piece = 0; piece < partials.pieces(); ++piece) {
            const double* from = partials.at(piece).rows[0] + d;
            PYSTEER_PICK(moments_merge)(from, w.width, out.rows[0] + d, w.width, channels);
        }
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
    const Partials partials(pieces, w.width, out, w.fresh);
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
    merge(partials, w, out);
}

// What one thread needs to walk a tile of channels.
template <class T>
class Scratch {
 public:
    static constexpr std::int64_t kWidth = kTile;

    // The statistics of a chunk of tokens of one tile into [8][out_width]; the channels that do not fill a step are
    // copied together.
    void take(const T* x, std::int64_t stride, std::int64_t tokens, std::int64_t width, const Limits& limits,
              double* out, std::int64_t out_width) {
        const auto moments = PYSTEER_PICK(moments_tokens<T>);
        const std::int64_t steps = width / step_, rest = width % step_;
        if (steps) moments(x, stride, tokens, steps, limits, known(), out, out_width);
        if (!rest) return;
        if (!rest_) rest_.reset(new T[kChunk * step_]);
        for (std::int64_t t = 0; t < tokens; ++t) {
            T* to = rest_.get() + t * step_;
            std::copy_n(x + t * stride + steps * step_, rest, to);
            std::fill(to + rest, to + step_, T{});
        }
        double found[8 * kLargestStep];
        moments(rest_.get(), step_, tokens, 1, limits, known(), found, step_);
        for (int k = 0; k < 8; ++k) std::copy_n(found + k * step_, rest, out + k * out_width + steps * step_);
    }

    double* chunk() { return chunk_.get(); }  // [8][kWidth]

 private:
    // Begins where a cache line does: vectors that lie across two of them cost twice.
    void* known() {
        char* start = known_.get();
        return start + (64 - reinterpret_cast<std::uintptr_t>(start) % 64);
    }

    const std::int64_t step_ = PYSTEER_PICK(moments_step)();
    std::unique_ptr<char[]> known_{new char[(kTile / step_ + 1) * PYSTEER_PICK(moments_scratch<T>)() + 64]};
    std::unique_ptr<double[]> chunk_{new double[8 * kWidth]};
    std::unique_ptr<T[]> rest_;
};

// Channels next to each other: a piece of work is a part of the chunks of one tile of channels.
template <class T>
void by_token(const T* x, Walk w, const Moments& out) {
    if (w.row == w.tokens * w.token || w.tokens == 1) {
        w.token = w.tokens == 1 ? w.row : w.token;
        w.tokens *= w.rows;
        w.rows = 1;
    }
    const std::int64_t tiles = (w.width + kTile - 1) / kTile;
    const std::int64_t in_tile = ((w.width + tiles - 1) / tiles + kLargestStep - 1) / kLargestStep * kLargestStep;
    const std::int64_t parts = (w.tokens + kChunk - 1) / kChunk;
    const std::int64_t chunks = w.rows * parts, pieces = std::min(chunks, (kPieces + tiles - 1) / tiles);
    const Partials partials(pieces, w.width, out, w.fresh);
#pragma omp parallel num_threads(w.threads) if (w.threads > 1)
    {
        Scratch<T> scratch;
#pragma omp for schedule(static) nowait
        for (std::int64_t i = 0; i < tiles * pieces; ++i) {
            const std::int64_t piece = i / tiles, d = i % tiles * in_tile, width = std::min(in_tile, w.width - d);
            double* into = partials.at(piece).rows[0] + d;
            const std::int64_t first = first_of(piece, pieces, chunks), last = first_of(piece + 1, pieces, chunks);
            for (std::int64_t c = first; c < last; ++c) {
                const std::int64_t t = c % parts * kChunk, tokens = std::min(kChunk, w.tokens - t);
                const T* from = x + c / parts * w.row + t * w.token + d;
                if (c == first) {
                    scratch.take(from, w.token, tokens, width, w.limits, into, w.width);
                    continue;
                }
                scratch.take(from, w.token, tokens, width, w.limits, scratch.chunk(), Scratch<T>::kWidth);
                PYSTEER_PICK(moments_merge)(scratch.chunk(), Scratch<T>::kWidth, into, w.width, width);
            }
        }
    }
    merge(partials, w, out);
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

int channel_moments(std::uintptr_t x, std::uintptr_t out, std::int64_t rows, std::int64_t tokens, std::int64_t width,
                    std::int64_t x_row, std::int64_t x_token, std::int64_t x_channel, double eps,
                    std::int64_t accumulate, std::int64_t dtype, std::int64_t threads) {
    const py::gil_scoped_release release;
    const DType type = DType(dtype);
    Moments moments;
    for (int k = 0; k < 8; ++k) moments.rows[k] = reinterpret_cast<double*>(out) + k * width;
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    const Walk walk{rows,
                    tokens,
                    width,
                    x_row,
                    x_token,
                    x_channel,
                    {near_bits(float(eps), type)},
                    threads_for(bytes, threads),
                    !accumulate};
    if (type == DType::float32) run<float>(x, walk, moments);
    if (type == DType::bfloat16) run<BFloat16>(x, walk, moments);
    if (type == DType::float16) run<Float16>(x, walk, moments);
    return ok;
}

void register_channel_moments(py::module_& m) {
    def_kernel<&channel_moments>(m, "channel_moments",
                                 "channel_moments on the CPU: [8, width] doubles, fresh or added to; returns 0.");
}

PYSTEER_REGISTER_OP(register_channel_moments)

}  // namespace
}  // namespace pysteer
