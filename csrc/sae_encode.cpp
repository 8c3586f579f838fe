// sae_encode on the CPU: the largest of x W' + b per token, found tile by tile without keeping the products.
//
// Many tokens are screened: packed tokens times packed latents, in bfloat16 where the processor multiplies that faster.
// The products are then known up to a margin that the lengths of what was rounded off bound, and what may be among the
// largest is computed again as a dot product in fp32 from the tensors as they came. Few tokens, and tokens with too
// many such latents, take the dot products of all latents. So a value is the same bits however it was found.

#include <atomic>
#include <functional>
#include <vector>

#include "panels.h"
#include "registry.h"

namespace pysteer {
namespace {

// What a token may keep, so far.
struct Candidates {
    float *upper, *lower;  // bounds of the value, equal where it is exact
    std::int32_t* index;
    std::int64_t count;
    float limit;  // below it nothing is kept; NaN at the start
    bool overflow;
};

// Some latents.
struct PanelOf {
    const float *bias, *threshold, *sizes, *errors;
    std::int64_t count;
    std::int32_t first;
};

// Larger values have larger keys, NaN the largest; among equals the lowest index has.
inline std::uint64_t key_of(float value, std::int32_t index) {
    std::uint32_t bits = 0xffffffffu;
    if (value == value) {
        bits = bits_of(value + 0.0f);
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    }
    return std::uint64_t(bits) << 32 | (0xffffffffu - std::uint32_t(index));
}

inline float value_of(std::uint64_t key) {
    const std::uint32_t bits = std::uint32_t(key >> 32);
    if (bits == 0xffffffffu) return __builtin_nanf("");
    return float_of(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

inline std::int32_t index_of(std::uint64_t key) { return std::int32_t(0xffffffffu - std::uint32_t(key)); }

// The `keep` largest keys, in any order.
inline void cut(std::vector<std::uint64_t>& keys, std::int64_t keep) {
    if (std::int64_t(keys.size()) <= keep) return;
    std::nth_element(keys.begin(), keys.begin() + (keep - 1), keys.end(), std::greater<>());
    keys.resize(keep);
}

// How a token narrows its candidates down to `keep`.
struct Selection {
    std::int64_t latents, width, keep, room;
    const float *bias, *threshold;

    PanelOf panel(std::int64_t first, std::int64_t size) const {
        const float* limits = threshold ? threshold + first : nullptr;
        return {bias + first, limits, nullptr, nullptr, std::min(size, latents - first), std::int32_t(first)};
    }

    // Drops all but the `keep` best of candidates that are exact.
    void cut_exact(Candidates& mine) const {
        static thread_local std::vector<std::uint64_t> keys;
        keys.clear();
        for (std::int64_t i = 0; i < mine.count; ++i) keys.push_back(key_of(mine.upper[i], mine.index[i]));
        cut(keys, keep);
        mine.count = std::int64_t(keys.size());
        for (std::int64_t i = 0; i < mine.count; ++i) {
            mine.upper[i] = mine.lower[i] = value_of(keys[i]);
            mine.index[i] = index_of(keys[i]);
        }
        if (mine.count == keep) raise(mine, value_of(*std::min_element(keys.begin(), keys.end())));
    }

    // Raises the limit to the last value that is kept for certain and drops what is below.
    void narrow(Candidates& mine) const {
        if (mine.count >= keep) {
            static thread_local std::vector<float> lower;
            lower.assign(mine.lower, mine.lower + mine.count);
            for (float& each : lower) each = each == each ? each : __builtin_inff();
            std::nth_element(lower.begin(), lower.begin() + (keep - 1), lower.end(), std::greater<>());
            raise(mine, lower[keep - 1]);
        }
        std::int64_t kept = 0;
        for (std::int64_t i = 0; i < mine.count; ++i) {
            if (mine.upper[i] < mine.limit) continue;
            mine.upper[kept] = mine.upper[i];
            mine.lower[kept] = mine.lower[i];
            mine.index[kept++] = mine.index[i];
        }
        mine.count = kept;
    }

    void narrow_or_give_up(Candidates& mine) const {
        narrow(mine);
        mine.overflow = mine.overflow || mine.count > room;
        if (mine.overflow) mine.count = 0;  // will be done over
    }

    static void raise(Candidates& mine, float limit) {
        if (limit != limit) limit = __builtin_inff();
        if (!(mine.limit >= limit)) mine.limit = limit;
    }
};

}  // namespace
}  // namespace pysteer

#define PYSTEER_WITH_AMX
#define PYSTEER_KERNEL "sae_encode.simd.h"
#include "each_isa.h"

namespace py = pybind11;

namespace pysteer {
namespace {

constexpr std::int64_t kChunk = 64;    // tokens that a thread takes at once
constexpr std::int64_t kSlots = 8;     // threads that screen the same tokens
constexpr std::int64_t kFew = 12;      // tokens that are not worth packing all latents for
constexpr std::int64_t kWorthIt = 24;  // latents per kept one from which screening pays

struct Encode {
    TokenFrame tokens;
    LatentFrame latents;
    const float *pre_bias, *bias, *threshold;
    std::int64_t keep, share, group;
    bool relu;
    DType out;
    void* values;
    std::int32_t* indices;
    int threads;

    Selection selection(std::int64_t room) const {
        return {latents.latents, latents.width, keep, std::max<std::int64_t>(room, 192), bias, threshold};
    }
};

template <class V>
void write(const std::vector<std::uint64_t>& keys, std::int64_t keep, bool relu, V* values, std::int32_t* indices) {
    for (std::int64_t i = 0; i < keep; ++i) {
        const bool there = i < std::int64_t(keys.size());
        const float value = there ? value_of(keys[i]) : 0.0f;
        values[i] = from_float<V>(relu && value < 0.0f ? 0.0f : value);
        indices[i] = there ? index_of(keys[i]) : -1;
    }
}

// Sorts the keys of token n and writes the result.
void write(const Encode& op, std::vector<std::uint64_t>& keys, std::int64_t n) {
    cut(keys, op.keep);
    std::sort(keys.begin(), keys.end(), std::greater<>());
    const std::int64_t at = n * op.keep;
    std::int32_t* indices = op.indices + at;
    if (op.out == DType::float32) write(keys, op.keep, op.relu, static_cast<float*>(op.values) + at, indices);
    if (op.out == DType::bfloat16) write(keys, op.keep, op.relu, static_cast<BFloat16*>(op.values) + at, indices);
    if (op.out == DType::float16) write(keys, op.keep, op.relu, static_cast<Float16*>(op.values) + at, indices);
}

// Candidates of some tokens, empty.
struct Pool {
    std::int64_t capacity;
    Buffer<float> bounds;
    Buffer<std::int32_t> index;
    std::vector<Candidates> candidates;

    Pool(std::int64_t count, std::int64_t room)
        : capacity(room + kWidestPanel + 16), bounds(2 * count * capacity), index(count * capacity), candidates(count) {
        clear();
    }

    void clear() {
        for (std::int64_t t = 0; t < std::int64_t(candidates.size()); ++t) {
            float* mine = bounds.get() + 2 * t * capacity;
            candidates[t] = {mine, mine + capacity, index.get() + t * capacity, 0, __builtin_nanf(""), false};
        }
    }
};

// All dot products of tokens `ids`. Where there are few tokens, the threads share the latents too.
template <class T, class W>
void encode_all(const Encode& op, const std::vector<std::int64_t>& ids, const T* x, const W* w) {
    const std::int64_t count = std::int64_t(ids.size()), width = op.latents.width;
    const std::int64_t chunk = std::clamp<std::int64_t>(ceil_div(ceil_div(count, op.threads), 6) * 6, 6, kChunk);
    const std::int64_t chunks = ceil_div(count, chunk);
    const std::int64_t most = ceil_div(op.latents.latents, 4 * kWidestPanel);
    const std::int64_t splits = chunks >= op.threads ? 1 : std::min(most, ceil_div(2 * op.threads, chunks));
    const std::int64_t part = ceil_div(ceil_div(op.latents.latents, splits), kWidestPanel) * kWidestPanel;
    const Selection selection = op.selection(3 * op.keep);
    Pool pool(count * splits, selection.room);
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        const Buffer<float> floats(std::min(chunk, count) * width);
        std::vector<std::uint64_t> keys;
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < chunks * splits; ++i) {
            const std::int64_t first = i / splits * chunk, split = i % splits, tokens = std::min(chunk, count - first);
            for (std::int64_t t = 0; t < tokens; ++t) {
                PYSTEER_PICK(token_floats<T>)
                (x + op.tokens.offset(ids[first + t]), op.tokens.channel_stride, op.pre_bias, width,
                 floats.get() + t * width);
            }
            PYSTEER_PICK(encode_dots<W>)
            (floats.get(), tokens, w, op.latents, split * part, std::min((split + 1) * part, op.latents.latents),
             selection, pool.candidates.data() + split * count + first);
        }
#pragma omp for schedule(static)
        for (std::int64_t t = 0; t < count; ++t) {
            keys.clear();
            for (std::int64_t split = 0; split < splits; ++split) {
                const Candidates& mine = pool.candidates[split * count + t];
                for (std::int64_t i = 0; i < mine.count; ++i) keys.push_back(key_of(mine.upper[i], mine.index[i]));
            }
            write(op, keys, ids[t]);
        }
    }
}

// The bounds from below of the `keep` best of a token, filled with -inf.
void lowest_of(const Candidates& mine, std::int64_t keep, float* out) {
    static thread_local std::vector<float> lower;
    lower.assign(mine.lower, mine.lower + mine.count);
    for (float& each : lower) each = each == each ? each : __builtin_inff();
    if (mine.count > keep) std::nth_element(lower.begin(), lower.begin() + keep - 1, lower.end(), std::greater<>());
    const std::int64_t count = mine.overflow ? 0 : std::min(mine.count, keep);
    std::copy_n(lower.begin(), count, out);
    std::fill(out + count, out + keep, -__builtin_inff());
}

// Of whole groups of tokens that share their places: raises the limits to what the group keeps for certain.
void share_limits(const Encode& op, std::vector<float>& lower, std::vector<Candidates>& candidates) {
    const std::int64_t size = op.group * op.keep, kept = op.share * op.group;
    if (size <= kept) return;
    for (std::size_t first = 0; first * op.keep < lower.size(); first += op.group) {
        const auto group = lower.begin() + first * op.keep;
        std::nth_element(group, group + kept - 1, group + size, std::greater<>());
        for (std::int64_t t = 0; t < op.group; ++t) Selection::raise(candidates[first + t], group[kept - 1]);
    }
}

// The exact result of a token whose candidates are known.
template <class T, class W>
void finish(const Encode& op, const Selection& selection, Candidates& mine, const T* x, const W* w, std::int64_t n,
            float* floats, std::vector<std::uint64_t>& keys) {
    selection.narrow(mine);
    keys.clear();
    PYSTEER_PICK(token_floats<T>)(x, op.tokens.channel_stride, op.pre_bias, op.latents.width, floats);
    float sums[kWidestPanel];
    const W* rows[kWidestPanel];
    for (std::int64_t first = 0; first < mine.count; first += kWidestPanel) {
        const std::int64_t count = std::min(kWidestPanel, mine.count - first);
        const std::int32_t* index = mine.index + first;
        for (std::int64_t i = 0; i < count; ++i) rows[i] = w + index[i] * op.latents.stride;
        PYSTEER_PICK(some_dots<W>)(floats, rows, count, op.latents.width, sums);
        for (std::int64_t i = 0; i < count; ++i) {
            const float a = sums[i] + op.bias[index[i]];
            if (!op.threshold || a > op.threshold[index[i]]) keys.push_back(key_of(a, index[i]));
        }
    }
    write(op, keys, n);
}

// What several threads found of one token, together in the first; too much is an overflow.
void merge(const Selection& selection, Pool& pool, std::int64_t slots, std::int64_t count, std::int64_t t) {
    Candidates& mine = pool.candidates[t];
    static thread_local std::vector<float> upper, lower;
    static thread_local std::vector<std::int32_t> index;
    upper.clear();
    lower.clear();
    index.clear();
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        const Candidates& other = pool.candidates[slot * count + t];
        mine.overflow = mine.overflow || other.overflow;
        upper.insert(upper.end(), other.upper, other.upper + other.count);
        lower.insert(lower.end(), other.lower, other.lower + other.count);
        index.insert(index.end(), other.index, other.index + other.count);
    }
    Candidates all{upper.data(), lower.data(), index.data(), std::int64_t(index.size()), mine.limit, false};
    selection.narrow(all);
    mine.overflow = mine.overflow || all.count > pool.capacity;
    if (mine.overflow) return;
    std::copy_n(all.upper, all.count, mine.upper);
    std::copy_n(all.lower, all.count, mine.lower);
    std::copy_n(all.index, all.count, mine.index);
    mine.count = all.count;
    mine.limit = all.limit;
}

// Tokens [start, start + count); appends those with too many candidates to `left`. A thread takes one panel of latents
// after the other and keeps what it finds to itself; the order does not matter, since all candidates are weighed again.
template <class T, class W>
void encode_some(const Encode& op, const Selection& selection, std::int64_t start, std::int64_t count, const T* x,
                 const W* w, const TokenBuffers& buffers, Pool& pool, std::vector<std::int64_t>& left) {
    const std::int64_t block = PYSTEER_PICK(block_size)(), panel = PYSTEER_PICK(panel_size)();
    const std::int64_t blocks = ceil_div(count, block), panels = ceil_div(op.latents.latents, panel);
    const PackedTokens packed = buffers.tokens(count);
    std::vector<const T*> tokens(count);
    for (std::int64_t t = 0; t < count; ++t) tokens[t] = x + op.tokens.offset(start + t);
    pool.clear();
    std::vector<float> lower(op.group && count % op.group == 0 ? count * op.keep : 0);
    std::vector<std::atomic<std::int64_t>> next(op.threads);
    for (auto& each : next) each = 0;
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
        const PanelBuffers own(op.latents.width, packed.pairs != nullptr);
        const PanelMemory memory = own.memory();
        std::vector<std::uint64_t> keys;
#pragma omp for schedule(static)
        for (std::int64_t b = 0; b < blocks; ++b) {
            PYSTEER_PICK(pack_tokens<T>)
            (tokens.data(), op.tokens.channel_stride, op.pre_bias, op.latents.width, packed, b, memory);
        }
        const Team team;
        const std::int64_t groups = ceil_div(team.size, kSlots), group = team.me % groups;
        Candidates* found = pool.candidates.data() + team.me / groups * count;
        const std::int64_t begin = blocks * group / groups, end = blocks * (group + 1) / groups;
        for (std::int64_t p = next[group]++; p < panels; p = next[group]++) {
            PYSTEER_PICK(screen_panel<W>)(w, op.latents, p * panel, packed, begin, end, selection, memory, found);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (std::int64_t t = 0; t < count; ++t) {
            merge(selection, pool, ceil_div(team.size, groups), count, t);
            if (!lower.empty()) lowest_of(pool.candidates[t], op.keep, lower.data() + t * op.keep);
        }
#pragma omp single
        if (!lower.empty()) share_limits(op, lower, pool.candidates);
#pragma omp for schedule(dynamic, 8)
        for (std::int64_t t = 0; t < count; ++t) {
            Candidates& mine = pool.candidates[t];
            if (!mine.overflow) finish(op, selection, mine, tokens[t], w, start + t, memory.floats, keys);
        }
    }
    for (std::int64_t t = 0; t < count; ++t) {
        if (pool.candidates[t].overflow) left.push_back(start + t);
    }
}

template <class T, class W>
void encode(const Encode& op, const T* x, const W* w) {
    const std::int64_t count = op.tokens.count();
    std::int64_t step = token_tile(count, op.latents.width);
    if (op.group && op.group <= step) step = step / op.group * op.group;
    std::vector<std::int64_t> left;
    if (count > kFew && op.latents.latents >= kWorthIt * op.keep) {
        const Selection selection = op.selection(6 * op.keep);
        const TokenBuffers buffers(step, op.latents.width, PYSTEER_PICK(has_pairs)());
        Pool pool(step * std::min<std::int64_t>(op.threads, kSlots), selection.room);
        for (std::int64_t first = 0; first < count; first += step) {
            encode_some(op, selection, first, std::min(step, count - first), x, w, buffers, pool, left);
        }
    } else {
        for (std::int64_t n = 0; n < count; ++n) left.push_back(n);
    }
    for (std::int64_t first = 0; first < std::int64_t(left.size()); first += step) {
        const auto end = left.begin() + std::min<std::int64_t>(first + step, left.size());
        encode_all(op, {left.begin() + first, end}, x, w);
    }
}

template <class T>
void encode(const Encode& op, const T* x, std::uintptr_t weight, DType type) {
    if (type == DType::float32) encode(op, x, reinterpret_cast<const float*>(weight));
    if (type == DType::bfloat16) encode(op, x, reinterpret_cast<const BFloat16*>(weight));
    if (type == DType::float16) encode(op, x, reinterpret_cast<const Float16*>(weight));
}

// `bias` and `threshold` (null: none) have room for kWidestPanel more floats than there are latents. `group`: how many
// tokens, one after the other, share `share` places each; 0 where each has its own.
void sae_encode(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t pre_bias,
                std::uintptr_t threshold, std::uintptr_t values, std::uintptr_t indices, std::int64_t rows,
                std::int64_t tokens, std::int64_t width, std::int64_t x_row, std::int64_t x_token,
                std::int64_t x_channel, std::int64_t latents, std::int64_t w_stride, std::int64_t keep,
                std::int64_t share, std::int64_t group, bool relu, std::int64_t x_type, std::int64_t w_type,
                std::int64_t out_type, std::int64_t threads) {
    const py::gil_scoped_release release;
    Encode op;
    op.tokens = {rows, tokens, width, x_row, x_token, x_channel};
    op.latents = {latents, width, w_stride};
    op.bias = reinterpret_cast<const float*>(bias);
    op.pre_bias = reinterpret_cast<const float*>(pre_bias);
    op.threshold = reinterpret_cast<const float*>(threshold);
    op.keep = keep;
    op.share = share;
    op.group = group;
    op.relu = relu;
    op.out = DType(out_type);
    op.values = reinterpret_cast<void*>(values);
    op.indices = reinterpret_cast<std::int32_t*>(indices);
    op.threads = threads_for_products(rows * tokens * latents * width, threads);
    const DType type = DType(w_type);
    if (DType(x_type) == DType::float32) encode(op, reinterpret_cast<const float*>(x), weight, type);
    if (DType(x_type) == DType::bfloat16) encode(op, reinterpret_cast<const BFloat16*>(x), weight, type);
    if (DType(x_type) == DType::float16) encode(op, reinterpret_cast<const Float16*>(x), weight, type);
}

void register_sae_encode(py::module_& m) {
    m.attr("PANEL_ROOM") = kWidestPanel;
    m.def("sae_encode", &sae_encode, "The largest pre-activations of every token, on the CPU.");
}

PYSTEER_REGISTER_OP(register_sae_encode)

}  // namespace
}  // namespace pysteer
