// norm_affine on the CPU: tokens, or groups of channels, are split over threads, the inner loops are in
// norm_affine.simd.h.

#include <cmath>
#include <optional>

#include "registry.h"
#include "steering_call.h"

namespace pysteer {
namespace {

// Count, mean and sum of squares around it.
struct Spread {
    double count = 0.0, mean = 0.0, squares = 0.0;

    void merge(double n, double m, double s) {
        const double all = count + n, away = m - mean;
        squares += s + away * away * (count * n / all);
        mean += away * (n / all);
        count = all;
    }
};

}  // namespace
}  // namespace pysteer

#define PYSTEER_KERNEL "norm_affine.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kChunkBytes = 64 << 10;  // of one piece of work

enum Kind : std::int64_t { kRms = 0, kLayer = 1, kGroup = 2 };

struct NormAffine {
    Frame frame;
    const float *weight, *norm_bias, *gain, *bias;
    float offset, eps;  // offset: 1 where the weight is stored without it
    Kind kind;
    std::int64_t groups;
    std::vector<Row> rows;
    int threads;
    bool streaming;
};

// p and q of all channels for one parameter set and strength; each thread keeps those it used last.
class Maps {
 public:
    const Maps& of(const NormAffine& op, std::int64_t set, float strength) {
        const std::int64_t width = op.frame.width;
        if (!p.empty() && set == set_ && strength == strength_) return *this;
        set_ = set;
        strength_ = strength;
        p.resize(width);
        q.resize(width);
        PYSTEER_PICK(fold_maps)(width, op.weight, op.norm_bias, op.offset, set ? op.gain + set * width : nullptr,
                                op.bias + set * width, strength, p.data(), q.data());
        return *this;
    }

    std::vector<float> p, q;

 private:
    std::int64_t set_ = -1;
    float strength_ = 0.0f;
};

// Called by all threads of a team, as is run_by_group.
template <class T>
void run_by_token(const T* x, T* y, const NormAffine& op) {
    const Frame& f = op.frame;
    const auto norm = PYSTEER_PICK(norm_tokens<T>);
    const std::int64_t step = std::max<std::int64_t>(kChunkBytes / std::int64_t(f.width * sizeof(T)), 1);
    const std::int64_t chunks = (f.tokens + step - 1) / step;
    Maps plain, shifted;
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < f.rows * chunks; ++i) {
        const std::int64_t r = i / chunks, first = i % chunks * step, last = std::min(first + step, f.tokens);
        const Row& row = op.rows[r];
        const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
        const auto part = [&](std::int64_t begin, std::int64_t stop, const Maps& maps) {
            norm(x + r * f.x_row + begin * f.x_token, y + r * f.y_row + begin * f.y_token, stop - begin, f.x_token,
                 f.y_token, f.width, op.kind == kLayer, op.eps, maps.p.data(), maps.q.data(), op.streaming);
        };
        if (first < start) part(first, start, plain.of(op, 0, 0.0f));
        if (end - start == 1) {
            PYSTEER_PICK(norm_one<T>)
            (x + r * f.x_row + start * f.x_token, y + r * f.y_row + start * f.y_token, f.width, op.kind == kLayer,
             op.eps, op.weight, op.norm_bias, op.offset, op.gain + row.set * f.width, op.bias + row.set * f.width,
             row.strength);
        } else if (start < end) {
            part(start, end, shifted.of(op, row.set, row.strength));
        }
        if (end < last) part(end, last, plain.of(op, 0, 0.0f));
    }
}

template <class T>
void run_by_group(const T* x, T* y, const NormAffine& op) {
    const Frame& f = op.frame;
    const auto scale = PYSTEER_PICK(scale_of_group<T>);
    const auto norm = PYSTEER_PICK(norm_plane<T>);
    const std::int64_t channels = f.width / op.groups;
    Maps plain, shifted;
    plain.of(op, 0, 0.0f);
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < f.rows * op.groups; ++i) {
        const std::int64_t r = i / op.groups, first = i % op.groups * channels;
        const Row& row = op.rows[r];
        if (row.start < row.end) shifted.of(op, row.set, row.strength);
        float mean, root;
        scale(x + r * f.x_row + first * f.x_channel, channels, f.x_channel, f.tokens, op.eps, &mean, &root);
        for (std::int64_t d = first; d < first + channels; ++d) {
            const T* from = x + r * f.x_row + d * f.x_channel;
            T* to = y + r * f.y_row + d * f.y_channel;
            const auto part = [&](std::int64_t begin, std::int64_t stop, const Maps& maps) {
                norm(from + begin, to + begin, stop - begin, mean, root, maps.p[d], maps.q[d], op.streaming);
            };
            if (0 < row.start) part(0, row.start, plain);
            if (row.start < row.end) part(row.start, row.end, shifted);
            if (row.end < f.tokens) part(row.end, f.tokens, plain);
        }
    }
}

// Mean and 1 / sqrt(var + eps) of every row and channel, where a group's channels lie side by side in each token.
struct GroupScales {
    std::int64_t step, chunks;
    std::vector<float> sums, squares, mean, root;

    GroupScales(const Frame& f, std::int64_t element)
        : step(std::max<std::int64_t>(4 * kChunkBytes / (f.width * element), 1)), chunks((f.tokens + step - 1) / step) {
        sums.resize(f.rows * chunks * f.width);
        squares.resize(sums.size());
        mean.resize(f.rows * f.width);
        root.resize(mean.size());
    }

    template <class T>
    void add_up(const T* x, const NormAffine& op) {
        const Frame& f = op.frame;
        const auto add = PYSTEER_PICK(sums_of_tokens<T>);
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < f.rows * chunks; ++i) {
            const std::int64_t first = i % chunks * step, last = std::min(first + step, f.tokens);
            add(x + i / chunks * f.x_row + first * f.x_token, last - first, f.x_token, f.width,
                sums.data() + i * f.width, squares.data() + i * f.width);
        }
    }

    template <class T>
    void finish(const T* x, const NormAffine& op) {
        const Frame& f = op.frame;
        const auto merge = PYSTEER_PICK(merge_sums<T>);
        const std::int64_t channels = f.width / op.groups;
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < f.rows * op.groups; ++i) {
            const std::int64_t r = i / op.groups, d = i % op.groups * channels;
            Spread all;
            for (std::int64_t c = 0; c < chunks; ++c) {
                const std::int64_t first = c * step, last = std::min(first + step, f.tokens);
                const std::int64_t place = (r * chunks + c) * f.width + d;
                merge(all, x + r * f.x_row + first * f.x_token + d, sums.data() + place, squares.data() + place,
                      channels, last - first);
            }
            const float variance = float(all.squares / all.count);
            std::fill_n(mean.begin() + r * f.width + d, channels, float(all.mean));
            std::fill_n(root.begin() + r * f.width + d, channels, 1.0f / std::sqrt(variance + op.eps));
        }
    }
};

template <class T>
void run_by_token_in_groups(const T* x, T* y, const NormAffine& op, GroupScales& scales) {
    const Frame& f = op.frame;
    const auto norm = PYSTEER_PICK(norm_tokens_by_channel<T>);
    scales.add_up(x, op);
    scales.finish(x, op);
    Maps plain, shifted;
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < f.rows * scales.chunks; ++i) {
        const std::int64_t r = i / scales.chunks, first = i % scales.chunks * scales.step;
        const std::int64_t last = std::min(first + scales.step, f.tokens);
        const Row& row = op.rows[r];
        const std::int64_t start = std::clamp(row.start, first, last), end = std::clamp(row.end, start, last);
        const auto part = [&](std::int64_t begin, std::int64_t stop, const Maps& maps) {
            norm(x + r * f.x_row + begin * f.x_token, y + r * f.y_row + begin * f.y_token, stop - begin, f.x_token,
                 f.y_token, f.width, scales.mean.data() + r * f.width, scales.root.data() + r * f.width, maps.p.data(),
                 maps.q.data(), op.streaming);
        };
        if (first < start) part(first, start, plain.of(op, 0, 0.0f));
        if (start < end) part(start, end, shifted.of(op, row.set, row.strength));
        if (end < last) part(end, last, plain.of(op, 0, 0.0f));
    }
}

template <class T>
void run(std::uintptr_t x, std::uintptr_t y, const NormAffine& op) {
    const T* from = reinterpret_cast<const T*>(x);
    T* to = reinterpret_cast<T*>(y);
    const Frame& f = op.frame;
    const bool planes = op.kind == kGroup && f.tokens > 1 && f.x_token == 1 && f.y_token == 1;
    std::optional<GroupScales> scales;
    if (op.kind == kGroup && !planes) scales.emplace(f, sizeof(T));
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        if (planes) {
            run_by_group(from, to, op);
        } else if (scales) {
            run_by_token_in_groups(from, to, op, *scales);
        } else {
            run_by_token(from, to, op);
        }
        if (op.streaming) finish_streams();
    }
}

int norm_affine(std::uintptr_t x, std::uintptr_t y, std::uintptr_t weight, std::uintptr_t norm_bias,
                std::uintptr_t gain, std::uintptr_t bias, std::uintptr_t slot, std::uintptr_t strength,
                std::uintptr_t clock, std::uintptr_t span, std::int64_t rows, std::int64_t tokens, std::int64_t width,
                std::int64_t x_row, std::int64_t x_token, std::int64_t x_channel, std::int64_t y_row,
                std::int64_t y_token, std::int64_t y_channel, std::int64_t sets, std::int64_t steps,
                std::int64_t capacity, std::int64_t dtype, std::int64_t kind, double eps, bool plus_one,
                std::int64_t groups, std::int64_t threads) {
    const py::gil_scoped_release release;
    NormAffine op;
    op.frame = {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel};
    op.weight = reinterpret_cast<const float*>(weight);
    op.norm_bias = reinterpret_cast<const float*>(norm_bias);
    op.gain = reinterpret_cast<const float*>(gain);
    op.bias = reinterpret_cast<const float*>(bias);
    op.offset = plus_one ? 1.0f : 0.0f;
    op.eps = float(eps);
    op.kind = Kind(kind);
    op.groups = groups;
    const Table table = table_at(slot, strength, clock, span, sets, steps, capacity);
    if (const Status status = read_rows(table, op.frame, op.rows)) return status;
    const DType type = DType(dtype);
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    op.threads = threads_for(bytes, threads);
    op.streaming = worth_streaming(reinterpret_cast<void*>(x), reinterpret_cast<void*>(y), bytes);
    if (type == DType::float32) run<float>(x, y, op);
    if (type == DType::bfloat16) run<BFloat16>(x, y, op);
    if (type == DType::float16) run<Float16>(x, y, op);
    return ok;
}

void register_norm_affine(py::module_& m) {
    m.def("norm_affine", &norm_affine, "norm_affine on the CPU; returns 0, 1 (clock outside) or 2 (slot outside).");
}

PYSTEER_REGISTER_OP(register_norm_affine)

}  // namespace
}  // namespace pysteer
