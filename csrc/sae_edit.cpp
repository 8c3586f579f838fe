// sae_edit and its gradient in x on the CPU: blocks of tokens are split over threads, inner loops in sae_edit.simd.h.
//
// A block is read once from memory: scores, gates and the sum find it in the cache. The gate "topk" first scores all
// tokens, then ranks those that its other conditions let through.

#include <cstdint>
#include <type_traits>
#include <vector>

#include "dtype.h"
#include "packed.h"
#include "panels.h"
#include "registry.h"
#include "steering_call.h"

namespace pysteer {
namespace {

// Tokens [count][width] and their edits [count][edits]: what they score and which latents they are.
struct RankedTokens {
    std::int64_t count, width, edits;
    const float *floats, *scores;
    const std::int32_t* own;

    RankedTokens from(std::int64_t t, std::int64_t size) const {
        return {size, width, edits, floats + t * width, scores + t * edits, own + t * edits};
    }
};

}  // namespace
}  // namespace pysteer

#define PYSTEER_WITH_AMX
#define PYSTEER_KERNEL "sae_edit.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

enum class Gate : std::int64_t { none = 0, relu = 1, threshold = 2, topk = 3 };

struct FullEncoder {
    std::uintptr_t weight;
    const float* bias;
    std::int64_t latents, stride;
    DType type;
};

struct SaeEdit {
    Frame frame;
    const float *encoder, *encoder_bias, *decoder, *scale, *add, *level;
    const std::int32_t* latent;
    std::int64_t edits;
    Gate gate;
    std::int64_t k;
    FullEncoder full;
    std::vector<Row> rows;
    int threads;
    bool streaming, backward;

    bool is_topk() const { return gate == Gate::topk; }
    bool scored() const { return !backward || gate != Gate::none; }
    const float* encoder_of(const Row& row) const { return encoder + row.set * edits * frame.width; }
    const float* decoder_of(const Row& row) const { return decoder + row.set * edits * frame.width; }
    const std::int32_t* latent_of(const Row& row) const { return latent + row.set * edits; }

    float level_of(const Row& row, std::int64_t e) const { return level ? level[row.set * edits + e] : 0.0f; }

    // Whether a gate is open, for the gate "topk" as far as it does not depend on the other latents.
    bool is_open(const Row& row, std::int64_t e, float score) const {
        if (gate == Gate::none) return true;
        const float active = score < 0.0f ? 0.0f : score;
        if (gate == Gate::threshold) return active > level_of(row, e);
        return score > 0.0f && (gate == Gate::relu || !level || active > level_of(row, e));
    }

    // What the direction of an edit is weighted with; along: product of the gradient and the direction.
    float weight(const Row& row, std::int64_t e, float score, float along, bool ranked) const {
        if (!ranked || !is_open(row, e, score)) return 0.0f;
        const float factor = scale[row.set * edits + e] - 1.0f;
        if (backward) return gate == Gate::none || score > 0.0f ? row.strength * factor * along : 0.0f;
        const float active = gate == Gate::none || !(score < 0.0f) ? score : 0.0f;
        return row.strength * (factor * active + add[row.set * edits + e]);
    }
};

}  // namespace
}  // namespace pysteer

#include "sae_edit_ranks.h"

namespace pysteer {
namespace {

struct Block {
    std::int64_t row, first, last;
};

std::int64_t block_of(const SaeEdit& op) {
    if (!op.frame.by_token()) return 64;
    return op.edits <= 4 ? 8 : 32;
}

// Calls function with the blocks of tokens, on all threads; every thread makes its own function from `make`.
template <class Make>
void for_blocks(const SaeEdit& op, const Make& make) {
    const std::int64_t size = block_of(op), blocks = (op.frame.tokens + size - 1) / size;
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        auto function = make();
#pragma omp for schedule(dynamic) nowait
        for (std::int64_t i = 0; i < op.frame.rows * blocks; ++i) {
            const std::int64_t first = i % blocks * size;
            function(Block{i / blocks, first, std::min(first + size, op.frame.tokens)});
        }
        if (op.streaming) finish_streams();
    }
}

// The scores of tokens [start, end) of a row, in the arithmetic of the ranking: channel by channel in any layout.
template <class T>
void score_for_ranks(const T* x, const SaeEdit& op, const Row& row, std::int64_t start, std::int64_t end,
                     float* scratch, float* scores) {
    const Frame& f = op.frame;
    for (std::int64_t t = start; t < end; ++t) {
        PYSTEER_PICK(gather_token<T>)(x + t * f.x_token, f.x_channel, f.width, scratch + (t - start) * f.width);
    }
    PYSTEER_PICK(score_tokens<float>)
    (scratch, f.width, end - start, f.width, op.encoder_of(row), op.edits, nullptr, scores);
}

// Scores all tokens and ranks those that the other conditions of the gate let through.
template <class T>
Ranks score_and_rank(const T* x, const SaeEdit& op) {
    const Frame& f = op.frame;
    const std::int64_t all = f.rows * f.tokens * op.edits;
    Ranks ranks{std::vector<float>(all, -__builtin_inff()), std::vector<std::int32_t>(all, 0)};
    for_blocks(op, [&] {
        return [&, scratch = std::vector<float>(block_of(op) * f.width)](const Block& block) mutable {
            const Row& row = op.rows[block.row];
            const std::int64_t start = std::clamp(row.start, block.first, block.last);
            const std::int64_t end = std::clamp(row.end, start, block.last);
            float* scores = ranks.score.data() + (block.row * f.tokens + start) * op.edits;
            score_for_ranks(x + block.row * f.x_row, op, row, start, end, scratch.data(), scores);
            for (std::int64_t i = 0; i < (end - start) * op.edits; ++i) {
                scores[i] += op.encoder_bias[row.set * op.edits + i % op.edits];
            }
        };
    });
    rank(x, op, ranks);
    return ranks;
}

// What one thread works with.
struct Scratch {
    std::vector<float> tokens, score, along, weight, turned, used;
    std::vector<const float*> rows;
    std::vector<std::uint8_t> kept;

    explicit Scratch(const SaeEdit& op)
        : tokens(block_of(op) * op.frame.width),
          score(block_of(op) * op.edits),
          along(score.size()),
          weight(score.size()),
          turned(score.size()),
          used(op.edits),
          rows(op.edits),
          kept(block_of(op)) {}
};

template <class T>
void scores(const T* x, const SaeEdit& op, std::int64_t start, std::int64_t end, const float* vectors, Scratch& scratch,
            float* found) {
    const Frame& f = op.frame;
    if (f.by_token()) {
        PYSTEER_PICK(score_tokens<T>)
        (x + start * f.x_token, f.x_token, end - start, f.width, vectors, op.edits, scratch.tokens.data(), found);
    } else {
        PYSTEER_PICK(score_channels<T>)
        (x + start, f.x_channel, end - start, f.width, vectors, op.edits, found);
    }
}

// Weights [tokens, edits] of the tokens [start, end) of a row.
template <class T>
void weigh(const T* x, const T* gradient, const SaeEdit& op, std::int64_t r, std::int64_t start, std::int64_t end,
           const Ranks& ranks, Scratch& scratch) {
    const Row& row = op.rows[r];
    const std::int64_t place = (r * op.frame.tokens + start) * op.edits;
    const float* score = scratch.score.data();
    if (op.is_topk()) {
        score = ranks.score.data() + place;
    } else if (op.scored()) {
        scores(x, op, start, end, op.encoder_of(row), scratch, scratch.score.data());
        for (std::int64_t i = 0; i < (end - start) * op.edits; ++i) {
            scratch.score[i] += op.encoder_bias[row.set * op.edits + i % op.edits];
        }
    }
    if (op.backward) scores(gradient, op, start, end, op.decoder_of(row), scratch, scratch.along.data());
    for (std::int64_t i = 0; i < (end - start) * op.edits; ++i) {
        const bool ranked = !op.is_topk() || ranks.before[place + i] < op.k;
        scratch.weight[i] = op.weight(row, i % op.edits, score[i], scratch.along[i], ranked);
    }
}

template <class T>
void add_in_channels(const T* from, T* to, const SaeEdit& op, std::int64_t start, std::int64_t end,
                     const float* vectors, Scratch& scratch) {
    const Frame& f = op.frame;
    const std::int64_t tokens = end - start, by = block_of(op);
    std::fill(scratch.kept.begin(), scratch.kept.end(), std::uint8_t(1));
    int count = 0;
    for (std::int64_t e = 0; e < op.edits; ++e) {
        bool any = false;
        for (std::int64_t t = 0; t < tokens; ++t) {
            const float weight = scratch.weight[t * op.edits + e];
            scratch.turned[count * by + t] = weight;
            if (weight != 0.0f) {
                any = true;
                scratch.kept[t] = 0;
            }
        }
        if (any) scratch.rows[count++] = vectors + e * f.width;
    }
    if (count == 0) {
        copy_channels(from, to, start, end, f);
        return;
    }
    PYSTEER_PICK(add_to_channels<T>)
    (from + start, to + start, f.x_channel, f.y_channel, tokens, f.width, scratch.rows.data(), count,
     scratch.turned.data(), by, scratch.kept.data());
}

template <class T>
void run(std::uintptr_t x_address, std::uintptr_t y_address, std::uintptr_t gradient_address, const SaeEdit& op) {
    const T* x = reinterpret_cast<const T*>(x_address);
    const T* gradient = reinterpret_cast<const T*>(gradient_address);
    const T* source = op.backward ? gradient : x;
    T* y = reinterpret_cast<T*>(y_address);
    const Frame& f = op.frame;
    const Ranks ranks = op.is_topk() ? score_and_rank(x, op) : Ranks{};
    for_blocks(op, [&] {
        return [&, scratch = Scratch(op)](const Block& block) mutable {
            const Row& row = op.rows[block.row];
            const std::int64_t at = block.row * f.x_row;
            const std::int64_t start = std::clamp(row.start, block.first, block.last);
            const std::int64_t end = std::clamp(row.end, start, block.last);
            const T* from = source + at;
            T* to = y + block.row * f.y_row;
            const auto copy = f.by_token() ? copy_tokens<T> : copy_channels<T>;
            copy(from, to, block.first, start, f);
            copy(from, to, end, block.last, f);
            if (start == end) return;
            weigh(x + at, op.backward ? gradient + at : nullptr, op, block.row, start, end, ranks, scratch);
            const float* vectors = op.backward ? op.encoder_of(row) : op.decoder_of(row);
            if (f.by_token()) {
                PYSTEER_PICK(add_to_tokens<T>)
                (from + start * f.x_token, to + start * f.y_token, f.x_token, f.y_token, end - start, f.width, vectors,
                 op.edits, scratch.weight.data(), op.streaming, scratch.used.data(), scratch.rows.data());
            } else {
                add_in_channels(from, to, op, start, end, vectors, scratch);
            }
        };
    });
}

template <class T>
const T* at(std::uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

int sae_edit(std::uintptr_t x, std::uintptr_t y, std::uintptr_t gradient, std::uintptr_t encoder,
             std::uintptr_t encoder_bias, std::uintptr_t decoder, std::uintptr_t scale, std::uintptr_t add,
             std::uintptr_t level, std::uintptr_t full, std::uintptr_t full_bias, std::uintptr_t latent,
             std::uintptr_t slot, std::uintptr_t strength, std::uintptr_t clock, std::uintptr_t span, std::int64_t rows,
             std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token, std::int64_t x_channel,
             std::int64_t y_row, std::int64_t y_token, std::int64_t y_channel, std::int64_t sets, std::int64_t edits,
             std::int64_t steps, std::int64_t capacity, std::int64_t latents, std::int64_t full_stride,
             std::int64_t full_type, std::int64_t gate, std::int64_t k, std::int64_t dtype, std::int64_t threads) {
    const py::gil_scoped_release release;
    SaeEdit op{};
    op.frame = {rows, tokens, width, x_row, x_token, x_channel, y_row, y_token, y_channel};
    op.encoder = at<float>(encoder);
    op.encoder_bias = at<float>(encoder_bias);
    op.decoder = at<float>(decoder);
    op.scale = at<float>(scale);
    op.add = at<float>(add);
    op.level = at<float>(level);
    op.latent = at<std::int32_t>(latent);
    op.edits = edits;
    op.gate = Gate(gate);
    op.k = k;
    op.full = {full, at<float>(full_bias), latents, full_stride, DType(full_type)};
    op.backward = gradient != 0;
    const Table table = table_at(slot, strength, clock, span, sets, steps, capacity);
    if (const Status status = read_rows(table, op.frame, op.rows)) return status;
    const DType type = DType(dtype);
    const std::int64_t bytes = rows * tokens * width * element_size(type);
    op.threads = threads_for(bytes * (op.is_topk() ? 16 : 1), threads);
    op.streaming = worth_streaming(at<char>(op.backward ? gradient : x), at<char>(y), bytes);
    if (type == DType::float32) run<float>(x, y, gradient, op);
    if (type == DType::bfloat16) run<BFloat16>(x, y, gradient, op);
    if (type == DType::float16) run<Float16>(x, y, gradient, op);
    return ok;
}

void register_sae_edit(py::module_& m) {
    def_kernel<&sae_edit>(
        m, "sae_edit",
        "sae_edit on the CPU, or its gradient where one is given; returns 0, 1 (clock outside) or 2 (slot outside).");
}

PYSTEER_REGISTER_OP(register_sae_edit)

}  // namespace
}  // namespace pysteer
